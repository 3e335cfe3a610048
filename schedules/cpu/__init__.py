"""What the schedules of CPUs share: instruction sets, products, vectors."""
