"""`fused-dlam gate`: compiles every pass and holds its machine code to the floor."""
