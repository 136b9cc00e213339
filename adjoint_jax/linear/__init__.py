"""Linear systems with the Jacobian of the vector field, which implicit methods solve."""
