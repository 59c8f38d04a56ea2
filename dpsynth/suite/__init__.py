"""Suite: audits that train something (shadows, canaries, worst cases): runs in, evidence out."""
