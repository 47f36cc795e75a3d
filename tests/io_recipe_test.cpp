// Recipes: one text each, read back the same, refused with a reason where anything is wrong.
#include "nibble/io/recipe.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>

#include "io_test_support.hpp"

namespace {

using namespace nibble;

TensorRecipe tensor(const std::string& name, const Scheme& scheme, const std::string& method) {
  TensorRecipe t;
  t.name = name;
  t.scheme = scheme;
  t.method = method;
  return t;
}

Recipe example() {
  Recipe r;
  r.seed = 0xFFFFFFFFFFFFFFFFU;
  r.transforms = {"rotate", "equalize"};
  r.parameters = {{"windows", 64.0}, {"share", 1.0 / 3.0}};
  r.inputs = {{"calibration", "a \"text\" \n \xC3\xA9"}};
  r.tensors.push_back(tensor(
      "blk.0.q", {Format::int4, Symmetry::asymmetric, Granularity::per_group(64, 1), ScaleType::fp16, false},
      "awq+gptq"));
  r.tensors.back().parameters = {{"damp", 0.1}, {"iterations", 200.0}, {"tiny", 5e-324}};
  r.tensors.push_back(
      tensor("blk.0.k", {Format::nf4, Symmetry::symmetric, Granularity::per_group(64, 1), ScaleType::fp32, false},
             "rtn"));
  r.tensors.back().double_quant_block = 256;
  r.tensors.push_back(tensor(
      "blk.0.v", {Format::int8, Symmetry::symmetric, Granularity::per_channel(0), ScaleType::bf16, true}, "mse"));
  r.tensors.push_back(tensor("output", {Format::fp16, Symmetry::symmetric, {}, ScaleType::fp32, false}, "rtn"));
  r.tensors.push_back({});
  r.tensors.back().name = "token_embd";
  r.tensors.back().keep = true;
  return r;
}

TEST(Recipe, ReadsBackTheSameAndHasOneText) {
  const Recipe r = example();
  const std::string text = recipe_text(r);
  const Recipe back = parse_recipe(text);
  EXPECT_TRUE(back == r);
  EXPECT_EQ(back.parameters.at("share"), 1.0 / 3.0);
  EXPECT_EQ(recipe_text(back), text);
  EXPECT_TRUE(parse_recipe(recipe_text(Recipe())) == Recipe());
  ASSERT_NE(back.find("blk.0.k"), nullptr);
  EXPECT_EQ(back.find("blk.0.k")->double_quant_block, 256U);
  EXPECT_EQ(back.find("blk"), nullptr);
}

TEST(Recipe, EqualSchemesHaveEqualTexts) {
  Recipe a = example();
  Recipe b = a;
  b.tensors[0].scheme.granularity = Granularity::per_group(64);  // axis -1
  EXPECT_EQ(recipe_text(a), recipe_text(b));
  b.tensors[0].scheme.granularity = Granularity::per_group(32);
  EXPECT_NE(recipe_text(a), recipe_text(b));
  b.check();
  EXPECT_FALSE(a == b);
}

TEST(Recipe, Files) {
  const io_test::TempFolder folder;
  const std::string path = folder.file("recipe.json");
  write_recipe(path, example());
  EXPECT_TRUE(read_recipe(path) == example());
  EXPECT_THROW(read_recipe(folder.file("none")), IoError);
  EXPECT_THROW(read_recipe(folder.path()), IoError);
}

/// The example's text with one place changed.
std::string changed(const std::string& from, const std::string& to) {
  std::string text = recipe_text(example());
  const std::size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return text.replace(at, from.size(), to);
}

std::string error_of(const std::string& text) {
  try {
    parse_recipe(text);
  } catch (const FormatError& error) {
    return error.what();
  }
  ADD_FAILURE() << "was read: " << text;
  return "";
}

TEST(Recipe, WhatIsWrongIsNamed) {
  const struct {
    const char* from;
    const char* to;
    const char* named;
  } cases[] = {
      {"\"nibble-recipe\"", "\"other\"", "format"},
      {"\"seed\": 18446744073709551615", "\"seed\": -1", "seed"},
      {"\"seed\": 18446744073709551615", "\"seed\": 1, \"seed\": 1", "twice"},
      {"\"rotate\"", "3", "transform"},
      {"\"rotate\"", "\"Rotate it\"", "transform 'Rotate it'"},
      {"\"windows\": 64.0", "\"windows\": \"64\"", "windows"},
      {"\"windows\": 64.0", "\"windows\": 1e999", "JSON"},
      {"\"seed\"", "\"sead\"", "does not know"},
      {"\"method\": \"awq", "\"methode\": \"awq", "tensor 0 ('blk.0.q') lacks 'method'"},
      {"\"format\": \"int4\"", "\"format\": \"int9\"", "unknown format 'int9'"},
      {"\"format\": \"int4\"", "\"format\": 4", "tensor 0 ('blk.0.q') has a 'format' that is no string"},
      {"\"asymmetric\"", "\"crooked\"",
       "unknown symmetry 'crooked', expected symmetric, asymmetric, float_offset"},
      {"\"per_group\"", "\"per_bird\"", "granularity"},
      {"\"axis\": 1", "\"axis\": 2", "axis 2"},
      {"\"group_size\": 64", "\"group_size\": 63", "group size is 63"},
      {"\"group_size\": 64", "\"group_size\": 64.5", "group_size"},
      {"\"full_range\": false", "\"full_range\": 0", "full_range"},
      {"\"scale_type\": \"fp16\"", "\"scale_type\": \"fp8\"", "scale_type 'fp8'"},
      {"\"awq+gptq\"", "\"awq++gptq\"", "method 'awq++gptq'"},
      {"\"awq+gptq\"", "\"\"", "method"},
      {"\"blk.0.k\"", "\"blk.0.q\"", "'blk.0.q' is there twice"},
      {"\"blk.0.k\"", "\"\"", "no name"},
      {"\"name\": \"blk.0.k\"", "\"title\": \"blk.0.k\"", "tensor 1 lacks 'name'"},
      {"\"keep\": true", "\"keep\": true, \"method\": \"rtn\"", "tensor 4 ('token_embd')"},
      {"\"keep\": true", "\"keep\": false", "lacks 'format'"},
      {"\"tensors\": [", "\"tensors\": [[[[[[[[1]]]]]]],", "deeper"},
      {"\"tensors\": [", "\"tensors\": [7,", "tensor 0 is no JSON object"},
      {"\"double_quant_block\": 0,\n   \"format\": \"fp16\"",
       "\"double_quant_block\": 256,\n   \"format\": \"fp16\"", "double quantization"},
  };
  for (const auto& c : cases) {
    const std::string message = error_of(changed(c.from, c.to));
    EXPECT_NE(message.find(c.named), std::string::npos) << c.to << ": " << message;
  }
  EXPECT_NE(error_of("[]").find("no JSON object"), std::string::npos);
  EXPECT_NE(error_of("").find("no JSON text"), std::string::npos);
  EXPECT_NE(error_of(std::string("{}\0", 3)).find("zero byte"), std::string::npos);
  EXPECT_THROW(parse_recipe(changed("\"version\": 1", "\"version\": 2")), Unsupported);
}

TEST(Recipe, EveryTruncationIsRefused) {
  const std::string text = recipe_text(example());
  // The last two characters are the closing brace and a line's end.
  for (std::size_t n = 0; n + 1 < text.size(); ++n)
    EXPECT_THROW(parse_recipe(text.substr(0, n)), FormatError) << n;
}

TEST(Recipe, WhatCannotBeWrittenIsRefused) {
  Recipe r = example();
  r.parameters["bad"] = std::numeric_limits<double>::quiet_NaN();
  EXPECT_THROW(recipe_text(r), InvalidArgument);
  r = example();
  r.tensors[0].name = "\xFF\xFE";
  EXPECT_THROW(recipe_text(r), InvalidArgument);
  r = example();
  r.tensors[0].scheme.granularity.group_size = 7;
  EXPECT_THROW(recipe_text(r), InvalidArgument);
}

}  // namespace
