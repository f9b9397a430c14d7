"""What `alphaq.quantizers.learned` is made of."""
