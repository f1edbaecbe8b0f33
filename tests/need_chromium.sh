#!/bin/sh
# The report is opened in a real browser: installs Chromium when root, otherwise says the line to type.
for name in chromium chromium-browser google-chrome; do
    command -v "$name" >/dev/null 2>&1 && exit 0
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing chromium for the tests of the report"
    apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null && exit 0
fi
echo "error: the tests need chromium; type: sudo apt-get install chromium" >&2
exit 2
