#include "check.h"
#include "json.h"
#include "utf8.h"

using mxforge::core::IsUtf8;
using mxforge::core::Json;

namespace {

Json Parsed(const std::string& text) { return Json::Parse(text, "a.json"); }

std::string Many(const std::string& piece, int count) {
  std::string made;
  for (int i = 0; i < count; ++i) made += piece;
  return made;
}

}  // namespace

TEST(json_of_every_kind) {
  const Json json = Parsed(
      " { \"a\" : [ true , false , null , -12 , 0.5e1 , \"x\" , { } , [ ] ] , \"b\" : 1 } \r\n\t");
  const std::vector<Json>& list = json["a"].List();
  CHECK_EQ(list.size(), size_t{8});
  CHECK(list[0].Bool() && !list[1].Bool() && list[2].IsNull());
  CHECK_EQ(list[3].Integer(), -12);
  CHECK_EQ(list[3].Real(), -12.0);
  CHECK_EQ(list[4].Real(), 5.0);
  CHECK_EQ(list[5].Text(), "x");
  CHECK(list[6].Object().empty() && list[7].List().empty());
  CHECK_EQ(json["b"].Size(), 1u);
  CHECK(json.Find("c") == nullptr);
}

TEST(json_texts) {
  CHECK_EQ(Parsed(R"("\"\\\/\b\f\n\r\t")").Text(), "\"\\/\b\f\n\r\t");
  CHECK_EQ(Parsed(R"("\u0041\u00e9\u20AC\ud83d\ude42")").Text(), "A\xC3\xA9\xE2\x82\xAC\xF0\x9F\x99\x82");
  CHECK_EQ(Parsed(R"("a\u0000b")").Text(), std::string("a\0b", 3));
  CHECK_EQ(Parsed("\"\xC3\xA9\"").Text(), "\xC3\xA9");
  for (const char* text : {"\"", "\"\\", "\"\\u12", "\"\\u12g4\"", "\"\\x\"", "\"\n\"", R"("\ud800")",
                           R"("\udc00")", R"("\ud800\u0041")", "\"\xC3\"", "\"\xED\xA0\x80\""}) {
    CHECK_REFUSED(Parsed(text), MXF_CORRUPT, "a.json is not readable JSON");
  }
}

TEST(json_numbers) {
  CHECK_EQ(Parsed("9223372036854775807").Integer(), INT64_MAX);
  CHECK_EQ(Parsed("-9223372036854775808").Integer(), INT64_MIN);
  CHECK_EQ(Parsed("-0").Integer(), 0);
  CHECK_EQ(Parsed("1e-2").Real(), 0.01);
  CHECK_REFUSED(Parsed("1e0").Integer(), MXF_CORRUPT, "a whole number");
  CHECK_REFUSED(Parsed("-1").Size(), MXF_CORRUPT, "a whole number from 0 on");
  CHECK_REFUSED(Parsed("9223372036854775808"), MXF_CORRUPT, "64 bits");
  for (const char* text : {"01", "+1", ".5", "1.", "1e", "1e+", "-", "NaN", "Infinity", "0x1"}) {
    CHECK_REFUSED(Parsed(text), MXF_CORRUPT, "not readable JSON");
  }
}

TEST(json_that_is_none) {
  for (const char* text : {"", " ", "{", "[", "[1", "[1,", "[1,]", "{\"a\"", "{\"a\":", "{\"a\":1,}",
                           "{a:1}", "{1:1}", "tru", "nul", "1 2", "{} {}", "\xEF\xBB\xBF{}", "[1 2]",
                           "{\"a\":1,\"a\":2}", "{\"a\":1,\"\\u0061\":2}"}) {
    CHECK_REFUSED(Parsed(text), MXF_CORRUPT, "not readable JSON");
  }
}

TEST(json_has_bounds) {
  Parsed(Many("[", 64) + Many("]", 64));
  CHECK_REFUSED(Parsed(Many("[", 66) + Many("]", 66)), MXF_CORRUPT, "nested too deeply");
  CHECK_REFUSED(Parsed(Many("[", 100'000)), MXF_CORRUPT, "nested too deeply");
  CHECK_REFUSED(Parsed("[" + Many("0,", 1 << 18) + "0]"), MXF_CORRUPT, "too many values");
}

TEST(json_errors_name_the_path) {
  const Json json = Parsed(R"({"weights": [{"shape": [1, "x"]}]})");
  CHECK_REFUSED(json["weights"].List()[0]["shape"].List()[1].Size(), MXF_CORRUPT,
                "a.json.weights[0].shape[1] should be a whole number from 0 on");
  CHECK_REFUSED(json["limits"], MXF_CORRUPT, "a.json should be an object with \"limits\"");
  // Of a long path, the end; what is no ASCII cannot reach a terminal.
  const Json deep = Parsed("{\"" + Many("x", 200) + "\": {\"\xC3\xA9\": 1}}");
  const Json& value = deep.Object()[0].second.Object()[0].second;
  CHECK_REFUSED(value.Text(), MXF_CORRUPT, "xxx.?? should be a text");
  CHECK_REFUSED(value.Text(), MXF_CORRUPT, "...xxx");
}

TEST(utf8) {
  for (const char* text : {"", "a", "\xC2\x80", "\xDF\xBF", "\xE0\xA0\x80", "\xED\x9F\xBF",
                           "\xEE\x80\x80", "\xF0\x90\x80\x80", "\xF4\x8F\xBF\xBF"}) {
    CHECK(IsUtf8(text));
  }
  for (const char* text : {"\x80", "\xC0\x80", "\xC1\xBF", "\xC2", "\xC2 ", "\xE0\x9F\xBF", "\xE0\xA0",
                           "\xED\xA0\x80", "\xED\xBF\xBF", "\xF0\x8F\xBF\xBF", "\xF4\x90\x80\x80",
                           "\xF5\x80\x80\x80", "\xFF", "a\xE2\x82"}) {
    CHECK(!IsUtf8(text));
  }
}
