"""kvmmm."""
