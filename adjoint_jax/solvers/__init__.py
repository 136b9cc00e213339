"""Solvers: one step of a method, and its transpose. Methods are Butcher tableaus."""
