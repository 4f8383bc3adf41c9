"""Types that every layer uses, such as arrays, grids, programs and contracts, and reading of untrusted input."""
