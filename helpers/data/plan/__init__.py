"""The size and crop of every image: training sizes, crops, and the plan that holds both. Pure arithmetic on arrays."""
