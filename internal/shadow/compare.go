package shadow

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"sallyport/internal/archive"
)

// A Difference is one field in which two answers differ.
type Difference struct {
	// Field is status, header.NAME, trailer.NAME, body, or body.PATH with []
	// for any index, so that those of many calls are counted together.
	Field string
	// name is of a header, path of a value of JSON; a and b are what stands
	// there, absent where nothing does.
	name string
	path []string
	a, b any
}

// absent stands for a value that is not there.
type absent struct{}

// passing are fields that say something of one message on one connection, and
// nothing of the answer.
var passing = map[string]bool{
	"connection": true, "keep-alive": true, "transfer-encoding": true, "content-length": true, "trailer": true, "te": true,
	"date": true, "x-request-id": true, "traceparent": true, "tracestate": true, "server-timing": true,
}

// fields are headers in the order of their names.
func fields(h http.Header) (out []archive.Field) {
	for _, name := range slices.Sorted(maps.Keys(h)) {
		for _, v := range h[name] {
			out = append(out, archive.Field{name, v})
		}
	}
	return out
}

// Compare finds where two answers differ. Ignore are fields as a report has
// them, or names of header fields, or paths of JSON in the form of
// archive.RedactConfig.
func Compare(a, b *archive.Answer, ignore []string) []Difference {
	c := comparison{names: map[string]bool{}}
	for _, n := range ignore {
		path := n
		if strings.HasPrefix(n, "body.") || strings.HasPrefix(n, "body[") {
			path = strings.TrimPrefix(strings.ReplaceAll(n[len("body"):], "[]", ".*"), ".")
		}
		c.paths = append(c.paths, archive.ParsePaths([]string{path})...)
		name := strings.ToLower(n)
		for _, where := range []string{"header.", "trailer."} {
			name = strings.TrimPrefix(name, where)
		}
		c.names[name] = true
	}
	if a.Status != b.Status && !c.names["status"] {
		c.found(Difference{Field: "status", a: a.Status, b: b.Status})
	}
	c.fields("header", a.Headers, b.Headers)
	c.fields("trailer", a.Trailers, b.Trailers)
	c.bodies(a, b)
	return c.out
}

type comparison struct {
	paths archive.Paths
	names map[string]bool
	out   []Difference
}

// maxFound bounds the differences of one pair: beyond, they say no more.
const maxFound = 1000

func (c *comparison) found(d Difference) {
	if len(c.out) < maxFound {
		d.Field = cut(d.Field, maxField)
		c.out = append(c.out, d)
	}
}

func (c *comparison) fields(where string, a, b []archive.Field) {
	x, y := byName(a), byName(b)
	names := slices.Collect(maps.Keys(x))
	for n := range y {
		if _, ok := x[n]; !ok {
			names = append(names, n)
		}
	}
	slices.Sort(names)
	for _, n := range names {
		v, inA := x[n]
		w, inB := y[n]
		if v == w && inA == inB || passing[n] || c.names[n] || strings.HasPrefix(n, "sallyport-") {
			continue
		}
		d := Difference{Field: where + "." + n, name: n, a: v, b: w}
		if !inA {
			d.a = absent{}
		}
		if !inB {
			d.b = absent{}
		}
		c.found(d)
	}
}

func byName(fs []archive.Field) map[string]string {
	out := map[string]string{}
	for _, f := range fs {
		n := strings.ToLower(f[0])
		if before, ok := out[n]; ok {
			out[n] = before + ", " + f[1]
		} else {
			out[n] = f[1]
		}
	}
	return out
}

// bodies compares as JSON what is JSON on both sides, and bytes otherwise.
func (c *comparison) bodies(a, b *archive.Answer) {
	if a.Omitted != "" || b.Omitted != "" {
		if a.SHA256 != b.SHA256 && !c.names["body"] {
			c.found(Difference{Field: "body", a: "sha256 " + a.SHA256, b: "sha256 " + b.SHA256})
		}
		return
	}
	x, y := plain(a), plain(b)
	if bytes.Equal(x, y) {
		return
	}
	if max(len(x), len(y)) <= maxJSON {
		v, errA := archive.ParseJSON(x)
		w, errB := archive.ParseJSON(y)
		if errA == nil && errB == nil {
			c.json(v, w, nil)
			return
		}
	}
	if !c.names["body"] {
		c.found(Difference{Field: "body", a: digest(x), b: digest(y)})
	}
}

// The bounds of what is taken apart: a value takes many times its bytes in
// memory, and the path of what lies deep much more.
const (
	maxJSON  = 1 << 20 // bytes
	maxDepth = 64
)

// digest tells bodies apart without showing them.
func digest(b []byte) string { return fmt.Sprintf("%d bytes, sha256 %.8x", len(b), sha256.Sum256(b)) }

// plain is the body without its compression.
func plain(a *archive.Answer) []byte {
	if !strings.EqualFold(a.Get("content-encoding"), "gzip") {
		return a.Body
	}
	z, err := gzip.NewReader(bytes.NewReader(a.Body))
	if err != nil {
		return a.Body
	}
	b, err := io.ReadAll(io.LimitReader(z, maxJSON+1))
	if err != nil || len(b) > maxJSON {
		return a.Body
	}
	return b
}

// json compares two values: objects by name, arrays by index, numbers as they
// were written.
func (c *comparison) json(a, b any, path []string) {
	if (len(path) > 0 && c.paths.Match(path)) || len(c.out) == maxFound {
		return
	}
	if len(path) == maxDepth {
		if !reflect.DeepEqual(a, b) {
			c.found(Difference{Field: bodyField(path), path: path, a: a, b: b})
		}
		return
	}
	at := func(name string) []string { return append(path[:len(path):len(path)], name) }
	switch x := a.(type) {
	case map[string]any:
		y, ok := b.(map[string]any)
		if !ok {
			break
		}
		names := slices.Collect(maps.Keys(x))
		for n := range y {
			if _, ok := x[n]; !ok {
				names = append(names, n)
			}
		}
		slices.Sort(names)
		for _, n := range names {
			c.json(member(x, n), member(y, n), at(n))
		}
		return
	case []any:
		y, ok := b.([]any)
		if !ok {
			break
		}
		for i := range max(len(x), len(y)) {
			c.json(element(x, i), element(y, i), at(strconv.Itoa(i)))
		}
		return
	default:
		if scalar(b) && a == b {
			return
		}
	}
	c.found(Difference{Field: bodyField(path), path: path, a: a, b: b})
}

// scalar says that == compares the value.
func scalar(v any) bool {
	switch v.(type) {
	case map[string]any, []any:
		return false
	}
	return true
}

func member(m map[string]any, name string) any {
	if v, ok := m[name]; ok {
		return v
	}
	return absent{}
}

func element(s []any, i int) any {
	if i < len(s) {
		return s[i]
	}
	return absent{}
}

// bodyField is a path as reports have it.
func bodyField(path []string) string {
	var b strings.Builder
	b.WriteString("body")
	for _, p := range path {
		if _, err := strconv.Atoi(p); err == nil {
			b.WriteString("[]")
		} else {
			b.WriteString("." + p)
		}
	}
	return b.String()
}

const (
	maxSample = 80  // bytes of a value that a report shows
	maxField  = 200 // bytes of the name of a field
)

// text is a value as a report shows it.
func text(v any, d *Difference, redact *archive.Redactor) string {
	if (v == absent{}) {
		return "(absent)"
	}
	v = redact.Value(v, d.path) // of a whole body, too
	if s, ok := v.(string); ok {
		if d.name != "" {
			s = redact.Field(d.name, s)
		}
		return cut(s, maxSample)
	}
	b, err := json.Marshal(v)
	if err != nil {
		return "(unreadable)"
	}
	return cut(string(b), maxSample)
}

func cut(s string, limit int) string {
	if len(s) <= limit {
		return s
	}
	return strings.ToValidUTF8(s[:limit], "") + "…"
}
