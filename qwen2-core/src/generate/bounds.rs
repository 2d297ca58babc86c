//! What of a constraint's source the library's own bounds do not see: expressions that must hold together.
//!
//! To intersect expressions it goes through the combinations of what each of them lets follow, which multiply
//! with their number, and looks at its bounds only in between: 20 patterns take it minutes, 40 for ever.

use std::collections::{HashMap, HashSet};

use serde_json::{Deserializer, Map, Value};

/// Different expressions for one text. Eight that do not follow from each other are more than the library
/// can decide on.
const MOST: usize = 12;
/// Steps through a schema, whose parts may refer to each other.
const MOST_STEPS: usize = 1 << 21;
/// What an object may have beside a reference without narrowing what that allows.
const REMARKS: [&str; 13] = [
    "$schema",
    "$id",
    "$comment",
    "$defs",
    "definitions",
    "title",
    "description",
    "default",
    "examples",
    "deprecated",
    "readOnly",
    "writeOnly",
    "x-guidance",
];
/// Stands for the properties without a name of their own.
const OTHERS: &str = "*";

/// # Errors
/// Why the schema cannot be used.
pub(super) fn check_schema(schema: &Value) -> Result<(), String> {
    let mut steps = 0;
    let mut nodes = vec![schema];
    while let Some(node) = nodes.pop() {
        match node {
            Value::Object(keys) => {
                if combines(keys) {
                    check_reach(schema, node, &mut steps)?;
                }
                nodes.extend(keys.values());
            }
            Value::Array(items) => nodes.extend(items),
            _ => {}
        }
    }
    Ok(())
}

/// Whether several parts of a schema must hold at once.
fn combines(keys: &Map<String, Value>) -> bool {
    let count = |names: &[&str]| {
        names
            .iter()
            .filter(|name| keys.contains_key(**name))
            .count()
    };
    let n_others = keys.len() - count(&REMARKS);
    keys.contains_key("allOf") || count(&["$ref", "anyOf", "oneOf"]) > 0 && n_others > 1
}

/// Counts the different expressions that may meet below a node: those for properties of one name.
fn check_reach(schema: &Value, node: &Value, steps: &mut usize) -> Result<(), String> {
    let mut found: HashMap<&str, HashSet<&str>> = HashMap::new();
    let mut seen = HashSet::new();
    let mut nodes = vec![(node, "")];
    while let Some((node, name)) = nodes.pop() {
        let (Value::Object(keys), true) = (node, seen.insert((std::ptr::from_ref(node), name)))
        else {
            continue;
        };
        *steps += 1;
        if *steps > MOST_STEPS {
            return Err("its parts combine in too many ways".to_owned());
        }
        for (key, value) in keys {
            match (&key[..], value) {
                ("pattern" | "format", Value::String(text)) => {
                    found.entry(name).or_default().insert(text);
                }
                ("$ref", Value::String(text)) => match text.strip_prefix('#') {
                    Some(pointer) if schema.pointer(pointer).is_some() => {
                        nodes.extend(schema.pointer(pointer).map(|node| (node, name)));
                    }
                    // By a name, which may be any part's.
                    _ => nodes.extend(parts(schema).map(|node| (node, name))),
                },
                ("properties", Value::Object(properties)) => {
                    nodes.extend(properties.iter().map(|(name, node)| (node, &name[..])));
                }
                ("patternProperties", Value::Object(properties)) => {
                    nodes.extend(properties.values().map(|node| (node, OTHERS)));
                }
                ("additionalProperties" | "unevaluatedProperties", node) => {
                    nodes.push((node, OTHERS));
                }
                ("items" | "contains", node) => nodes.push((node, "[]")),
                ("prefixItems", Value::Array(items)) => {
                    nodes.extend(items.iter().map(|node| (node, "[]")));
                }
                ("allOf" | "anyOf" | "oneOf", Value::Array(items)) => {
                    nodes.extend(items.iter().map(|node| (node, name)));
                }
                ("not" | "if" | "then" | "else", node) => nodes.push((node, name)),
                _ => {}
            }
        }
    }
    let others = found.remove(OTHERS).map_or(0, |found| found.len());
    let most = found.values().map(HashSet::len).max().unwrap_or_default() + others;
    match most > MOST {
        true => Err(too_many("patterns and formats", most)),
        false => Ok(()),
    }
}

/// The root and what it defines.
fn parts(schema: &Value) -> impl Iterator<Item = &Value> {
    let defined = ["$defs", "definitions"]
        .into_iter()
        .filter_map(|key| schema.get(key)?.as_object());
    std::iter::once(schema).chain(defined.flat_map(Map::values))
}

fn too_many(what: &str, n: usize) -> String {
    format!("{n} different {what} may have to hold for one text, the most is {MOST}")
}

/// # Errors
/// Why the grammar cannot be used.
pub(super) fn check_grammar(lark: &str) -> Result<(), String> {
    const JSON: &str = "%json";
    let (mut n, mut rest) = (1, lark);
    while let Some(first) = rest.chars().next() {
        let len = match first {
            '"' => quoted(rest, '"'),
            '/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            '/' => quoted(rest, '/'),
            '%' if rest.starts_with(JSON) => {
                let mut values = Deserializer::from_str(&rest[JSON.len()..]).into_iter();
                // What is no JSON, the library refuses.
                if let Some(Ok(schema)) = values.next() {
                    check_schema(&schema)?;
                }
                JSON.len() + values.byte_offset()
            }
            _ => {
                n += usize::from(first == '&');
                first.len_utf8()
            }
        };
        rest = &rest[len..];
    }
    match n > MOST {
        true => Err(too_many("expressions, joined by &,", n)),
        false => Ok(()),
    }
}

/// Length of what stands between two marks, the marks included; it ends with the line, too.
fn quoted(text: &str, mark: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        if c == '\n' || c == mark && !escaped {
            return at + c.len_utf8();
        }
        escaped = c == '\\' && !escaped;
    }
    text.len()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a panic is how a test fails
mod tests {
    use super::*;
    use serde_json::json;

    fn patterns(n: usize) -> Vec<Value> {
        (0..n)
            .map(|i| json!({"pattern": format!("a{i}")}))
            .collect()
    }

    fn is_refused(schema: Value) -> bool {
        let refused = check_schema(&schema).is_err();
        let lark = format!("start: a b\na: %json {schema}\nb: \"x\"");
        assert_eq!(check_grammar(&lark).is_err(), refused);
        refused
    }

    #[test]
    fn patterns_that_must_hold_together_are_counted_wherever_they_stand() {
        assert!(!is_refused(json!({"allOf": patterns(12)})));
        assert!(is_refused(json!({"allOf": patterns(13)})));
        assert!(is_refused(
            json!({"items": {"allOf": [{"allOf": patterns(9)}, {"allOf": patterns(13)}]}})
        ));
        let property = |i: usize| json!({"properties": {"a": patterns(20)[i]}});
        assert!(is_refused(
            json!({"allOf": (0..13).map(property).collect::<Vec<_>>()})
        ));
        let any = |i: usize| json!({"additionalProperties": patterns(20)[i]});
        let half = |i: usize| {
            if i.is_multiple_of(2) {
                property(i)
            } else {
                any(i)
            }
        };
        assert!(is_refused(
            json!({"allOf": (0..13).map(half).collect::<Vec<_>>()})
        ));
        // One by one, each beside a reference to the next.
        let chain = |i: usize| {
            let next = json!({"$ref": format!("#/$defs/d{}", i + 1), "pattern": format!("a{i}")});
            (format!("d{i}"), next)
        };
        let mut defs: Map<String, Value> = (0..13).map(chain).collect();
        defs.insert("d13".to_owned(), json!({"type": "string"}));
        assert!(is_refused(json!({"$defs": defs, "$ref": "#/$defs/d0"})));
        let named: Map<String, Value> = (0..13)
            .map(|i| {
                (
                    format!("d{i}"),
                    json!({"$anchor": format!("n{i}"), "pattern": format!("a{i}")}),
                )
            })
            .collect();
        assert!(is_refused(
            json!({"$defs": named, "allOf": [{"$ref": "#n1"}]})
        ));
    }

    #[test]
    fn many_properties_with_patterns_of_their_own_are_no_matter() {
        let named = |i: usize| (format!("p{i}"), patterns(60)[i].clone());
        let properties: Map<String, Value> = (0..60).map(named).collect();
        let base = json!({"type": "object", "properties": properties});
        assert!(!is_refused(base.clone()));
        assert!(!is_refused(
            json!({"$defs": {"base": base}, "allOf": [{"$ref": "#/$defs/base"}, {"required": ["p1"]}]})
        ));
        assert!(!is_refused(json!({"anyOf": patterns(60)})));
        // The same one is one.
        let same = vec![json!({"format": "date"}); 60];
        assert!(!is_refused(json!({"allOf": same})));
        // A schema that refers to itself.
        assert!(!is_refused(json!({"allOf": [{"items": {"$ref": "#"}}]})));
    }

    #[test]
    fn only_what_joins_expressions_counts_in_a_grammar() {
        let joined = |n: usize| vec!["/a&/"; n].join(" & ");
        assert!(check_grammar(&format!("start: A\nA: {}", joined(12))).is_ok());
        assert!(check_grammar(&format!("start: A\nA: {}", joined(13))).is_err());
        let quoted = "\"&&&\\\"&&&&&&&&&&&\" // &&&&&&&&&&&&&&\n";
        assert!(check_grammar(&format!("start: A\nA: {quoted}B: /\\/&&&&&&&&&&&&&&/")).is_ok());
        assert!(check_grammar("start: \"&&&&&&&&&&&&&&").is_ok());
    }
}
