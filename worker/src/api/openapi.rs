//! What there is to ask, as one table: the router and its description are both made of it, so that neither has what the other
//! lacks. Schemas come from the Rust types. No I/O.

use axum::{Router, routing::MethodRouter};
use schemars::{JsonSchema, Schema, SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value, json};

/// Adds a type's schema to the description; answers with a reference to it.
type Describe = fn(&mut SchemaGenerator) -> Schema;

/// Something that can be asked.
pub(super) struct Endpoint<S> {
    /// `get`, or `post` if it changes something.
    method: &'static str,
    path: &'static str,
    summary: &'static str,
    /// The body, and whether it may be left out.
    body: Option<(Describe, bool)>,
    answers: Vec<Answer>,
    handler: MethodRouter<S>,
}

struct Answer {
    status: u16,
    what: &'static str,
    content: Option<(&'static str, Describe)>,
}

impl<S: Clone + Send + Sync + 'static> Endpoint<S> {
    /// Something that changes nothing; `handler` is its `get`.
    pub(super) fn get(path: &'static str, summary: &'static str, handler: MethodRouter<S>) -> Self {
        Self { method: "get", path, summary, body: None, answers: Vec::new(), handler }
    }

    /// Something that changes the job; `handler` is its `post`.
    pub(super) fn post(path: &'static str, summary: &'static str, handler: MethodRouter<S>) -> Self {
        Self { method: "post", path, summary, body: None, answers: Vec::new(), handler }
    }

    /// It takes a body of this type.
    pub(super) fn takes<T: JsonSchema>(mut self, optional: bool) -> Self {
        self.body = Some((|g| g.subschema_for::<T>(), optional));
        self
    }

    /// It may answer so, with a value of this type.
    pub(super) fn answers<T: JsonSchema>(mut self, status: u16, what: &'static str) -> Self {
        self.answers.push(Answer { status, what, content: Some(("application/json", |g| g.subschema_for::<T>())) });
        self
    }

    /// It may answer so, with text.
    pub(super) fn answers_text(mut self, status: u16, what: &'static str) -> Self {
        self.answers.push(Answer { status, what, content: Some(("text/plain", |g| g.subschema_for::<String>())) });
        self
    }

    fn operation(&self, schemas: &mut SchemaGenerator) -> Value {
        let mut responses = Map::new();
        for Answer { status, what, content } in &self.answers {
            let mut response = json!({ "description": what });
            if let Some((of, describe)) = content {
                response["content"] = json!({ *of: { "schema": describe(schemas) } });
            }
            responses.insert(status.to_string(), response);
        }
        let mut operation = json!({ "summary": self.summary });
        if let Some((describe, optional)) = self.body {
            let content = json!({ "application/json": { "schema": describe(schemas) } });
            operation["requestBody"] = json!({ "required": !optional, "content": content });
        }
        operation["responses"] = responses.into();
        if self.method == "post" {
            operation["security"] = json!([{ "token": [] }]);
        }
        operation
    }
}

/// Routes every endpoint to its handler.
pub(super) fn route<S: Clone + Send + Sync + 'static>(endpoints: Vec<Endpoint<S>>) -> Router<S> {
    endpoints.into_iter().fold(Router::new(), |router, endpoint| router.route(endpoint.path, endpoint.handler))
}

/// Describes the endpoints, as OpenAPI 3.1 in JSON, with a line feed at the end.
pub(super) fn describe<S: Clone + Send + Sync + 'static>(endpoints: &[Endpoint<S>]) -> String {
    let settings = SchemaSettings::draft2020_12().for_serialize().with(|s| {
        s.definitions_path = "/components/schemas".into();
        s.meta_schema = None;
    });
    let mut schemas = settings.into_generator();
    let mut paths = Map::new();
    for endpoint in endpoints {
        let operation = endpoint.operation(&mut schemas);
        let path = paths.entry(endpoint.path).or_insert_with(|| json!({}));
        path[endpoint.method] = operation;
    }
    let mut schemas: Vec<(String, Value)> = schemas.take_definitions(true).into_iter().collect();
    schemas.sort_by(|(a, _), (b, _)| a.cmp(b));
    let token = json!({
        "type": "http",
        "scheme": "bearer",
        "description": "What is in the file of --http-token-file. Not asked for on the job's Unix socket.",
    });
    let all = json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Floodmark job",
            "description": "What a job that runs tells of itself, and what it can be asked to do.",
            "version": env!("CARGO_PKG_VERSION"),
        },
        "paths": paths,
        "components": {
            "schemas": schemas.into_iter().collect::<Map<_, _>>(),
            "securitySchemes": { "token": token },
        },
    });
    format!("{all:#}\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{endpoints, openapi};

    /// All references in a description.
    fn references(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(fields) => {
                if let Some(Value::String(to)) = fields.get("$ref") {
                    found.push(to.clone());
                }
                fields.values().for_each(|v| references(v, found));
            }
            Value::Array(values) => values.iter().for_each(|v| references(v, found)),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }

    #[test]
    fn every_endpoint_is_described_and_every_schema_that_is_named_is_there() {
        let all: Value = serde_json::from_str(openapi()).unwrap();
        let endpoints = endpoints();
        assert!(endpoints.len() >= 10);
        for Endpoint { method, path, .. } in &endpoints {
            let operation = &all["paths"][path][method];
            assert!(operation["summary"].is_string(), "{method} {path}");
            assert_eq!(operation["security"].is_array(), *method == "post", "{method} {path}");
        }
        let mut found = Vec::new();
        references(&all, &mut found);
        assert!(found.len() > 10);
        for to in found {
            let name = to.strip_prefix("#/components/schemas/").unwrap();
            assert!(all["components"]["schemas"][name].is_object(), "{to}");
        }
    }

    #[test]
    fn names_are_in_camel_case_and_described() {
        let all: Value = serde_json::from_str(openapi()).unwrap();
        for (name, schema) in all["components"]["schemas"].as_object().unwrap() {
            for (field, is) in schema["properties"].as_object().into_iter().flatten() {
                let plain = field.chars().all(|c| c.is_ascii_alphanumeric());
                assert!(plain && field.starts_with(|c: char| c.is_ascii_lowercase()), "{name}.{field}");
                assert!(is["description"].is_string(), "{name}.{field}");
            }
        }
    }
}
