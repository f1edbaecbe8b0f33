"""Adds a user to the tracking server of this container: the name as argument, the password on standard input."""

import os
import sys

from mlflow.server import get_app_client

os.environ["MLFLOW_TRACKING_USERNAME"] = "admin"
os.environ["MLFLOW_TRACKING_PASSWORD"] = os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"]
get_app_client("basic-auth", "http://localhost:5000").create_user(sys.argv[1], sys.stdin.read().strip())
