#!/usr/bin/env bash
# The gateway with curl. Start the system first with `chimera up`.
#     bash examples/curl.sh http://127.0.0.1:5700/v1
set -euo pipefail
url=${1:-http://127.0.0.1:5700/v1}
get() { curl -sS --fail-with-body "$@"; echo; }
post() { get -H "content-type: application/json" "$@"; }

echo "- models"
get "$url/models"

workflow="shell-$$-$(date +%s)"
echo "- workflow $workflow: a plan, then the solution while it is written"
post "$url/chat/completions" \
    -H "x-chimera-workflow-id: $workflow" -H "x-chimera-kind: math" \
    -d '{"model": "auto", "temperature": 0, "max_tokens": 64,
         "messages": [{"role": "user", "content": "Plan. Start with 7, then add 5. What is the result?"}]}'
post -N "$url/chat/completions" \
    -H "x-chimera-workflow-id: $workflow" \
    -d '{"model": "auto", "temperature": 0, "max_tokens": 128, "stream": true,
         "messages": [{"role": "user", "content": "Plan. Start with 7, then add 5. What is the result?"},
                      {"role": "assistant", "content": "start 7, add 5"},
                      {"role": "user", "content": "Solve by the plan."}]}'

echo "- how it ended"
post "$url/workflows/$workflow/outcome" -d '{"success": true}'

echo "- an error: there is no such model"
curl -sS -H "content-type: application/json" "$url/chat/completions" \
    -d '{"model": "gpt-9", "messages": [{"role": "user", "content": "Hello"}]}'
echo
