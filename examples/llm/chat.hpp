// Chat templates. GGUF holds them as Jinja programs; the few families that matter are recognised by their markers.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

namespace llm {

namespace chat_detail {

/// The system message that a ChatML template inserts where there is none: literal text after its system marker.
inline std::string default_system(const std::string& jinja) {
  for (const std::string_view marker : {"<|im_start|>system\n", "<|im_start|>system\\n"}) {
    const std::size_t at = jinja.find(marker);
    if (at == std::string::npos) continue;
    const std::size_t begin = at + marker.size();
    const std::size_t end = jinja.find("<|im_end|>", begin);
    if (end == std::string::npos) continue;
    const std::string text = jinja.substr(begin, end - begin);
    if (text.find_first_of("{}'\"") == std::string::npos) return text;
  }
  return {};
}

}  // namespace chat_detail

/// A prompt in three parts: only `before` and `after` are the template's and may hold control tokens; `user` is
/// somebody's text and must not become any.
struct ChatPrompt {
  std::string before;
  std::string user;
  std::string after;
};

/// One user's turn in the words of the model's template; an empty `system` means the template's own, if it has one.
inline ChatPrompt chat_prompt(const std::string& jinja, const std::string& system, const std::string& user) {
  const auto knows = [&](const char* marker) { return jinja.find(marker) != std::string::npos; };
  ChatPrompt p;
  p.user = user;
  if (knows("<|im_start|>")) {  // ChatML: SmolLM2, Qwen
    const std::string first = system.empty() ? chat_detail::default_system(jinja) : system;
    if (!first.empty()) p.before = "<|im_start|>system\n" + first + "<|im_end|>\n";
    p.before += "<|im_start|>user\n";
    p.after = "<|im_end|>\n<|im_start|>assistant\n";
  } else if (knows("<|start_header_id|>")) {  // Llama 3
    if (!system.empty()) p.before = "<|start_header_id|>system<|end_header_id|>\n\n" + system + "<|eot_id|>";
    p.before += "<|start_header_id|>user<|end_header_id|>\n\n";
    p.after = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n";
  } else if (knows("<|user|>")) {  // Zephyr, TinyLlama
    if (!system.empty()) p.before = "<|system|>\n" + system + "</s>\n";
    p.before += "<|user|>\n";
    p.after = "</s>\n<|assistant|>\n";
  } else if (knows("[INST]")) {  // Llama 2, Mistral
    p.before = "[INST] ";
    if (!system.empty()) p.before += "<<SYS>>\n" + system + "\n<</SYS>>\n\n";
    p.after = " [/INST]";
  } else {
    throw std::runtime_error(jinja.empty() ? "the model has no chat template"
                                           : "the model's chat template is not known");
  }
  return p;
}

}  // namespace llm
