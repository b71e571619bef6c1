"""What the rooms exchange: element types, tensors and places, state dicts, planned outputs. No I/O."""
