"""What ``launch.sh`` can do, a file each; a job is a client of a coordinator."""
