package archive

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strings"
)

// Redacted stands where something was taken out.
const Redacted = "[redacted]"

// RedactConfig is what must not be written down. Authorization, cookies and what
// else proves an identity never is.
type RedactConfig struct {
	// Headers are names of further fields, in any case.
	Headers []string `yaml:"headers"`
	// Query are names of parameters, of a query and of a form in a body.
	Query []string `yaml:"query"`
	// JSON are paths of what is taken out of bodies: card.number, or
	// items.*.secret with * for any one name or index, or **.password for any
	// depth. With any, a body that is not JSON is left out as a whole, and so is
	// one that says that it is a form.
	JSON []string `yaml:"json"`
}

// always are names of fields that prove an identity.
var always = []string{"authorization", "proxy-authorization", "cookie", "set-cookie", "dpop", "x-api-key", "x-forwarded-client-cert"}

// Validate reports every mistake by field name.
func (c RedactConfig) Validate() error {
	var errs []error
	for i, h := range c.Headers {
		if h == "" || strings.ContainsAny(h, " \t:") {
			errs = append(errs, fmt.Errorf("headers[%d]: %q is no name of a header field", i, h))
		}
	}
	for i, q := range c.Query {
		if q == "" {
			errs = append(errs, fmt.Errorf("query[%d]: is empty", i))
		}
	}
	for i, p := range c.JSON {
		segs := strings.Split(p, ".")
		for n, s := range segs {
			if s == "" || s == "**" && (n > 0 || len(segs) == 1) || strings.ContainsAny(s, "[]$") {
				errs = append(errs, fmt.Errorf("json[%d]: %q is no path; write names between dots, such as items.*.secret or **.password", i, p))
				break
			}
		}
	}
	return errors.Join(errs...)
}

// A Redactor takes out what must not be written down. The zero value, and nil,
// take out what proves an identity.
type Redactor struct {
	headers, query map[string]bool
	paths          Paths
}

// NewRedactor returns a Redactor of a configuration that is valid.
func NewRedactor(c RedactConfig) *Redactor {
	r := &Redactor{headers: map[string]bool{}, query: map[string]bool{}}
	for _, h := range c.Headers {
		r.headers[fold(h)] = true
	}
	for _, q := range c.Query {
		r.query[q] = true
	}
	r.paths = ParsePaths(c.JSON)
	return r
}

func fold(name string) string { return strings.ToLower(strings.ReplaceAll(name, "_", "-")) }

func (r *Redactor) orZero() *Redactor {
	if r == nil {
		return &Redactor{}
	}
	return r
}

// Field is the value of a field without what must not be shown: that of an
// address, too, has a query.
func (r *Redactor) Field(name, value string) string {
	r = r.orZero()
	switch name = fold(name); {
	case r.headers[name], slices.Contains(always, name):
		return Redacted
	case len(r.query) > 0 && (name == "referer" || name == "location" || name == "content-location"):
		before, query, ok := strings.Cut(value, "?")
		switch {
		case strings.Contains(query, "?"): // an address in an address, or another one
			return before + "?" + Redacted
		case ok:
			return before + "?" + r.form(query)
		}
	}
	return value
}

// Value takes out of a value of JSON, which stands at a path, what must not be
// shown.
func (r *Redactor) Value(v any, path []string) any {
	r = r.orZero()
	for n := 1; n < len(path); n++ {
		if r.paths.Match(path[:n]) {
			return Redacted
		}
	}
	return r.value(v, path)
}

// Paths are patterns of places in JSON, in the form of RedactConfig.JSON.
type Paths [][]string

// ParsePaths reads patterns.
func ParsePaths(patterns []string) (ps Paths) {
	for _, p := range patterns {
		ps = append(ps, strings.Split(p, "."))
	}
	return ps
}

// Match says whether one of the patterns is of that place.
func (ps Paths) Match(path []string) bool {
	for _, p := range ps {
		have := path
		if p[0] == "**" {
			if p = p[1:]; len(have) < len(p) {
				continue
			}
			have = have[len(have)-len(p):]
		}
		if matches(p, have) {
			return true
		}
	}
	return false
}

func matches(pattern, path []string) bool {
	if len(pattern) != len(path) {
		return false
	}
	for i, p := range pattern {
		if p != "*" && p != path[i] {
			return false
		}
	}
	return true
}

// Record takes out of a record what must not be written down.
func (r *Redactor) Record(rec *Record) {
	r = r.orZero()
	if q := rec.Request; q != nil {
		q.Query = r.form(q.Query)
		r.message(&q.Message)
	}
	for _, a := range []*Answer{rec.Primary, rec.Shadow, rec.Replayed} {
		if a != nil {
			r.message(&a.Message)
		}
	}
}

func (r *Redactor) message(m *Message) {
	for _, fields := range [][]Field{m.Headers, m.Trailers} {
		for i := range fields {
			fields[i][1] = r.Field(fields[i][0], fields[i][1])
		}
	}
	if len(m.Body) == 0 {
		return
	}
	kind, _, _ := strings.Cut(m.Get("content-type"), ";")
	if len(r.query) > 0 && strings.EqualFold(strings.TrimSpace(kind), "application/x-www-form-urlencoded") {
		if len(r.paths) > 0 || m.Get("content-encoding") != "" { // a message may say of itself what it likes
			m.Body, m.Omitted = nil, "the body says that it is a form, and may be something else"
			return
		}
		m.Body = Body(r.form(string(m.Body)))
		return
	}
	if len(r.paths) == 0 {
		return
	}
	v, err := ParseJSON(m.Body)
	if err != nil {
		m.Body, m.Omitted = nil, "the body is not JSON, so that nothing can be taken out of it"
		return
	}
	// Always written anew: of a name that is there twice only one was read.
	if m.Body, err = json.Marshal(r.value(v, nil)); err != nil {
		m.Body, m.Omitted = nil, "the body could not be written"
	}
}

// form takes parameters out of a query. One that cannot be read goes as a whole.
func (r *Redactor) form(query string) string {
	if len(r.query) == 0 || query == "" {
		return query
	}
	parts := strings.Split(query, "&")
	for i, p := range parts {
		name, _, _ := strings.Cut(p, "=")
		if plain, err := url.QueryUnescape(name); err != nil || r.query[plain] || strings.Contains(p, ";") {
			parts[i] = name + "=" + Redacted
		}
	}
	return strings.Join(parts, "&")
}

func (r *Redactor) value(v any, path []string) any {
	if len(path) > 0 && r.paths.Match(path) || len(path) > maxDepth {
		return Redacted
	}
	switch v := v.(type) {
	case map[string]any:
		for name, x := range v {
			v[name] = r.value(x, append(path[:len(path):len(path)], name))
		}
	case []any:
		for i, x := range v {
			v[i] = r.value(x, append(path[:len(path):len(path)], fmt.Sprint(i)))
		}
	}
	return v
}

// maxDepth bounds how deep a body is looked into: what lies deeper goes.
const maxDepth = 100

var errNotOne = errors.New("more than one value")

// ParseJSON reads one value and nothing behind it. Numbers stay as they were
// written.
func ParseJSON(b []byte) (v any, err error) {
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	if err := d.Decode(&v); err != nil {
		return nil, err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errNotOne
	}
	return v, nil
}
