// Claude Code driven from TypeScript in the sandbox image alone, without a gateway.
//
//     docker run --rm --init -e CLAUDE_CODE_OAUTH_TOKEN -v "$PWD/examples:/examples:ro" carrel-sandbox \
//         sh -c 'tsc --noCheck --noResolve --module nodenext --outDir /tmp/agent /examples/agent.mts
//                node /tmp/agent/agent.mjs'

import { query } from "@anthropic-ai/claude-agent-sdk";

const prompt: string = process.argv[2] ?? "Write hello.txt, then say what is in this folder.";

const messages = query({
  prompt,
  options: { cwd: "/workspace", permissionMode: "bypassPermissions", allowDangerouslySkipPermissions: true },
});
for await (const message of messages) {
  if (message.type === "assistant") {
    for (const block of message.message.content) {
      if (block.type === "text") console.log(block.text);
    }
  } else if (message.type === "result") {
    console.log(`${message.subtype} after ${message.num_turns} turns`);
  }
}
