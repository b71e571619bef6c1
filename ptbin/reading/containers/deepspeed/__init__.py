"""DeepSpeed's folders: ZeRO partitions, tensor-parallel ranks, pipelines, experts, universal checkpoints."""
