"""What is sent and when: lengths, prompts, arrival times, traces."""
