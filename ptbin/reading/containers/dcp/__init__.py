"""`torch.distributed.checkpoint` folders: their index, the chunks it names, the state dict they hold."""
