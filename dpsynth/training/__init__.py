"""Fleets of runs, what a person sees while they train, and what they leave."""
