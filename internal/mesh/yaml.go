package mesh

import (
	"encoding"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

const (
	// MaxFile is the size of the largest YAML file that is parsed, in bytes.
	MaxFile = 1 << 20
	// maxEntries is that of the file of entries: some 50,000 workloads.
	maxEntries = 8 << 20
)

// DecodeYAML reads one YAML document into the struct that v points to. It is
// strict: an unknown field, a duplicate key, a value of the wrong type or none,
// an anchor, alias or tag, and a second document are mistakes, and all of them
// are returned at once as Errors.
//
// Fields are named by their yaml tag, else by their json tag, else by their
// lower-case name. Text
// becomes a time.Duration ("5s") or whatever has an UnmarshalText method.
// Fields that the document does not name keep their value, so a struct filled
// with defaults keeps them. The value of a field tagged secret:"true" is never
// shown.
func DecodeYAML(file string, src []byte, v any) error {
	rv := reflect.ValueOf(v)
	if rv.Kind() != reflect.Pointer || rv.IsNil() || rv.Elem().Kind() != reflect.Struct {
		return fmt.Errorf("decode %s: %T is not a pointer to a struct", file, v)
	}
	d := &decoder{file: file, limit: MaxFile}
	d.decode(src, rv.Elem())
	return d.problems.orNil()
}

// A decoder walks a document and collects mistakes.
type decoder struct {
	file string
	// limit is the size of the largest file, bytes.
	limit    int
	lines    []string
	problems Errors
	// spoiled holds the fields of items that are written but could not be
	// decoded.
	spoiled map[Origin]map[string]bool
	// secrets are the names of fields whose value must not be shown.
	secrets []string
	// secret is true while below such a field.
	secret bool
}

// locator is implemented by structs that want to know where they stand.
type locator interface{ locate(Origin) }

// presetter is implemented by structs whose defaults are not zero.
type presetter interface{ preset() }

// brief is implemented by structs that may be written as one text.
type brief interface{ brief(text string) }

func (d *decoder) decode(src []byte, v reflect.Value) {
	d.spoiled = map[Origin]map[string]bool{}
	d.secrets = secretNames(v.Type(), nil, map[reflect.Type]bool{})
	if body := d.parse(src); body != nil {
		d.value(body, v, "")
	}
}

// parse returns the body of the only document, nil when there is none or when
// the text is not acceptable YAML.
func (d *decoder) parse(src []byte) (body ast.Node) {
	if len(src) > d.limit {
		d.problems = append(d.problems, &Problem{File: d.file, Msg: fmt.Sprintf("file has more than %d bytes", d.limit)})
		return nil
	}
	d.lines = splitLines(src)
	for i, l := range d.lines {
		if at := badByte(l); at >= 0 {
			pos := &token.Position{Line: i + 1, Column: 1 + utf8.RuneCountInString(l[:at])}
			d.at(&token.Token{Position: pos}, "character is not printable UTF-8 text")
			return nil
		}
	}
	defer func() {
		if r := recover(); r != nil {
			body = nil
			d.problems = append(d.problems, &Problem{File: d.file, Msg: "file is not valid YAML"})
		}
	}()
	tokens := lexer.Tokenize(string(src))
	if !d.plain(tokens) {
		return nil
	}
	f, err := parser.Parse(tokens, 0, parser.AllowDuplicateMapKey())
	if err != nil {
		var ye yaml.Error
		if errors.As(err, &ye) {
			d.at(ye.GetToken(), "%s", ye.GetMessage())
		} else {
			d.at(nil, "%s", oneLine(err))
		}
		return nil
	}
	for _, doc := range f.Docs {
		if doc == nil || doc.Body == nil {
			continue
		}
		if body != nil {
			d.at(nodeToken(doc.Body), "a second document begins here: a file holds one")
			return nil
		}
		body = doc.Body
	}
	return body
}

// at records a mistake at a token.
func (d *decoder) at(t *token.Token, format string, args ...any) {
	p := &Problem{File: d.file, Msg: fmt.Sprintf(format, args...)}
	if t != nil && t.Position != nil {
		p.Line, p.Col = t.Position.Line, t.Position.Column
		if p.Line >= 1 && p.Line <= len(d.lines) && !d.secret && !d.hidden(p.Line) {
			p.Text = d.lines[p.Line-1]
		}
	}
	d.problems = append(d.problems, p)
}

var (
	textType     = reflect.TypeFor[encoding.TextUnmarshaler]()
	durationType = reflect.TypeFor[time.Duration]()
	originType   = reflect.TypeFor[Origin]()
)

// value decodes one node. The name is the path of the field, for messages.
func (d *decoder) value(n ast.Node, v reflect.Value, name string) {
	if n == nil || n.Type() == ast.NullType {
		var t *token.Token
		if n != nil {
			t = n.GetToken()
		}
		d.at(t, "%s has no value: give one or leave the line out", cmpName(name))
		return
	}
	if v.Kind() == reflect.Pointer {
		if v.IsNil() {
			v.Set(reflect.New(v.Type().Elem()))
		}
		d.value(n, v.Elem(), name)
		return
	}
	switch {
	case v.Type() == durationType:
		d.duration(n, v, name)
	case v.CanAddr() && v.Addr().Type().Implements(textType):
		d.text(n, v.Addr().Interface().(encoding.TextUnmarshaler), name)
	case v.Kind() == reflect.Struct:
		if s, ok := n.(*ast.StringNode); ok {
			if b, ok := v.Addr().Interface().(brief); ok {
				b.brief(s.Value)
				return
			}
		}
		d.structure(n, v, name)
	case v.Kind() == reflect.Map:
		d.mapping(n, v, name)
	case v.Kind() == reflect.Slice:
		d.slice(n, v, name)
	default:
		d.scalar(n, v, name)
	}
}

func cmpName(name string) string {
	if name == "" {
		return "the document"
	}
	return name
}

func (d *decoder) structure(n ast.Node, v reflect.Value, name string) {
	pairs, ok := mapPairs(n)
	if !ok {
		d.wrong(n, name, "fields, each as \"name: value\"")
		return
	}
	bad := map[string]bool{}
	if l, ok := v.Addr().Interface().(locator); ok {
		o := Origin{File: d.file, Line: nodeToken(n).Position.Line}
		l.locate(o)
		d.spoiled[o] = bad
	}
	if p, ok := v.Addr().Interface().(presetter); ok && v.IsZero() {
		p.preset()
	}
	fields := map[string]field{}
	collectFields(v, fields)
	seen := map[string]int{}
	for _, kv := range pairs {
		key, ok := d.key(kv, seen)
		if !ok {
			continue
		}
		f, known := fields[key]
		if !known {
			hint, meant := fieldHint(key, name, fields)
			d.at(kv.Key.GetToken(), "unknown field %q%s", key, hint)
			bad[meant] = true
			continue
		}
		was, before := d.secret, len(d.problems)
		d.secret = was || f.secret
		d.value(kv.Value, f.v, join(name, key))
		d.secret = was
		bad[key] = bad[key] || len(d.problems) > before
	}
}

type field struct {
	v      reflect.Value
	secret bool
}

// collectFields lists the fields of a struct by name, those of inlined structs
// among them.
func collectFields(v reflect.Value, into map[string]field) {
	t := v.Type()
	for i := range t.NumField() {
		sf := t.Field(i)
		tag, opts, _ := strings.Cut(sf.Tag.Get("yaml"), ",")
		if !sf.IsExported() || tag == "-" || sf.Type == originType {
			continue
		}
		if (opts == "inline" || sf.Anonymous && tag == "") && sf.Type.Kind() == reflect.Struct {
			collectFields(v.Field(i), into)
			continue
		}
		if tag == "" {
			tag, _, _ = strings.Cut(sf.Tag.Get("json"), ",")
		}
		if tag == "" {
			tag = strings.ToLower(sf.Name)
		}
		into[tag] = field{v: v.Field(i), secret: sf.Tag.Get("secret") == "true"}
	}
}

// fieldHint says which field was most likely meant, empty when none is near.
func fieldHint(key, name string, fields map[string]field) (hint, meant string) {
	names := sortedKeys(fields)
	if near := nearest(strings.ToLower(key), names); near != "" {
		return fmt.Sprintf(": did you mean %q?", near), near
	}
	if name == "" {
		return "; known are " + strings.Join(names, ", "), ""
	}
	return fmt.Sprintf("; %s knows %s", name, strings.Join(names, ", ")), ""
}

// key returns the name of a pair, unless it is no text or was seen before.
func (d *decoder) key(kv *ast.MappingValueNode, seen map[string]int) (string, bool) {
	t := kv.Key.GetToken()
	s, ok := kv.Key.(*ast.StringNode)
	if !ok {
		if t == nil || kv.Key.Type() == ast.MappingKeyType {
			d.at(t, "key is not plain text")
			return "", false
		}
		s = &ast.StringNode{Value: t.Value}
	}
	if line, dup := seen[s.Value]; dup {
		d.at(t, "%q is written twice, first on line %d", s.Value, line)
		return "", false
	}
	seen[s.Value] = t.Position.Line
	return s.Value, true
}

func (d *decoder) mapping(n ast.Node, v reflect.Value, name string) {
	pairs, ok := mapPairs(n)
	if !ok {
		d.wrong(n, name, "fields, each as \"name: value\"")
		return
	}
	out := reflect.MakeMapWithSize(v.Type(), len(pairs))
	seen := map[string]int{}
	for _, kv := range pairs {
		key, ok := d.key(kv, seen)
		if !ok {
			continue
		}
		k := reflect.New(v.Type().Key())
		if u, ok := k.Interface().(encoding.TextUnmarshaler); ok {
			if err := u.UnmarshalText([]byte(key)); err != nil {
				d.at(kv.Key.GetToken(), "%s: key %q: %s", cmpName(name), key, oneLine(err))
				continue
			}
		} else if k.Elem().Kind() == reflect.String {
			k.Elem().SetString(key)
		} else {
			d.at(kv.Key.GetToken(), "%s: keys of %s cannot be decoded", cmpName(name), v.Type())
			return
		}
		e := reflect.New(v.Type().Elem()).Elem()
		d.value(kv.Value, e, join(name, key))
		out.SetMapIndex(k.Elem(), e)
	}
	v.Set(out)
}

func (d *decoder) slice(n ast.Node, v reflect.Value, name string) {
	s, ok := n.(*ast.SequenceNode)
	if !ok {
		d.wrong(n, name, "a list, each item after \"- \"")
		return
	}
	out := reflect.MakeSlice(v.Type(), len(s.Values), len(s.Values))
	for i, item := range s.Values {
		if item == nil || item.Type() == ast.NullType {
			d.at(s.GetToken(), "item %d of %s is empty", i+1, cmpName(name))
			continue
		}
		d.value(item, out.Index(i), fmt.Sprintf("%s[%d]", name, i))
	}
	v.Set(out)
}

// nodeToken is where a node begins: for a group of fields its first key, not
// the colon behind it.
func nodeToken(n ast.Node) *token.Token {
	if m, ok := n.(*ast.MappingNode); ok && m.IsFlowStyle {
		return m.Start
	}
	if pairs, ok := mapPairs(n); ok && len(pairs) > 0 {
		return pairs[0].Key.GetToken()
	}
	return n.GetToken()
}

func mapPairs(n ast.Node) ([]*ast.MappingValueNode, bool) {
	switch m := n.(type) {
	case *ast.MappingNode:
		return m.Values, true
	case *ast.MappingValueNode:
		return []*ast.MappingValueNode{m}, true
	}
	return nil, false
}

func join(name, key string) string {
	if name == "" {
		return key
	}
	return name + "." + key
}
