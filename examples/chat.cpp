// Streams the answers of a conversation, in C++17.
//
//     c++ -std=c++17 chat.cpp $(pkg-config --cflags --libs qwen2) -o chat && ./chat MODEL
#include <iostream>

#include "qwen2.hpp"

int main(int argc, char **argv) try {
    const auto model = qwen2::Model::load(argc > 1 ? argv[1] : "examples/demo-model");
    auto options = qwen2::Options::greedy();
    options.max_new_tokens(16);

    auto session = model.session();
    for (const char *question : {"What is 2 + 3?", "What comes after Monday?"}) {
        std::cout << "> " << question << '\n';
        session.append(qwen2::Prompt::user(question));
        auto stream = session.stream(options);
        while (const auto piece = stream.next())
            std::cout << *piece << std::flush;
        const auto answer = stream.finish();
        std::cout << "\n(" << answer.completion_tokens() << " tokens, " << answer.cached_tokens()
                  << " read before)\n";
    }
} catch (const qwen2::Error &error) {
    std::cerr << error.what() << '\n' << error.help() << '\n';
    return 1;
}
