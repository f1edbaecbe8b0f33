#!/bin/sh
# The tests of the cluster run a real PostgreSQL: installs it when root, otherwise says the line to type.
for place in /usr/lib/postgresql/*/bin; do
    [ -x "$place/initdb" ] && exit 0
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing postgresql for the tests of the cluster"
    apt-get update -qq && apt-get install -y -qq --no-install-recommends postgresql >/dev/null && exit 0
fi
echo "error: the tests of the cluster need PostgreSQL's server; type: sudo apt-get install postgresql" >&2
exit 2
