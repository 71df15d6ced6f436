"""How every image is cut: target sizes, cuts, and the plan of all of them. Pure arithmetic."""
