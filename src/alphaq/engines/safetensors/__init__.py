"""What engines of safetensors files share: where tensors lie, how modules are named, what lies beside the weights."""
