"""Suite: audits that train something: shadow fleets, canaries, worst cases. Runs in, evidence out."""
