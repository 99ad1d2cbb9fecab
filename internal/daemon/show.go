package daemon

import (
	"bytes"
	"encoding"
	"encoding/json"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strings"
	"time"
)

// mask stands for every secret that is set.
const mask = "********"

// Show writes v as YAML, the effective configuration of a process. Fields
// tagged `secret:"true"` that are set show as asterisks.
func Show(w io.Writer, v any) error {
	var b bytes.Buffer
	n := tree(reflect.ValueOf(v), false)
	switch {
	case len(n.items) > 0:
		n.writeYAML(&b, 0)
	default:
		fmt.Fprintln(&b, n.scalar())
	}
	_, err := w.Write(b.Bytes())
	return err
}

// Masked returns v in a form that encoding/json prints with the field names
// and the order of Show, secrets masked.
func Masked(v any) any { return tree(reflect.ValueOf(v), false) }

// A node is a value on its way to YAML or JSON: a scalar (text is its JSON
// form), a map (named items) or a list (items without names).
type node struct {
	kind  byte // 's', 'm', 'l'
	text  string
	items []item
}

type item struct {
	name string
	node node
}

// MarshalJSON implements json.Marshaler.
func (n node) MarshalJSON() ([]byte, error) {
	var b bytes.Buffer
	n.writeJSON(&b)
	return b.Bytes(), nil
}

func quoted(s string) node {
	// Marshal of a string cannot fail: bad UTF-8 is replaced.
	b, _ := json.Marshal(s)
	return node{kind: 's', text: string(b)}
}

// tree turns v into nodes. Inside a secret every scalar that is set is masked.
func tree(v reflect.Value, secret bool) node {
	for v.IsValid() && (v.Kind() == reflect.Pointer || v.Kind() == reflect.Interface) {
		if v.IsNil() {
			return node{kind: 's', text: "null"}
		}
		if _, ok := v.Interface().(encoding.TextMarshaler); ok && v.Kind() == reflect.Pointer {
			break
		}
		v = v.Elem()
	}
	if !v.IsValid() {
		return node{kind: 's', text: "null"}
	}
	if secret && !v.IsZero() {
		return quoted(mask)
	}
	if v.CanInterface() {
		switch x := v.Interface().(type) {
		case time.Duration:
			return quoted(x.String())
		case encoding.TextMarshaler:
			text, err := x.MarshalText()
			if err != nil {
				return quoted("(" + err.Error() + ")")
			}
			return quoted(string(text))
		}
	}
	switch v.Kind() {
	case reflect.Struct:
		return structTree(v)
	case reflect.Map:
		n := node{kind: 'm'}
		for _, k := range v.MapKeys() {
			n.items = append(n.items, item{fmt.Sprint(k.Interface()), tree(v.MapIndex(k), false)})
		}
		slices.SortFunc(n.items, func(a, b item) int { return strings.Compare(a.name, b.name) })
		return n
	case reflect.Slice, reflect.Array:
		n := node{kind: 'l'}
		for i := range v.Len() {
			n.items = append(n.items, item{node: tree(v.Index(i), false)})
		}
		return n
	case reflect.String:
		return quoted(v.String())
	case reflect.Func, reflect.Chan, reflect.UnsafePointer, reflect.Complex64, reflect.Complex128:
		return node{kind: 's', text: "null"}
	}
	b, err := json.Marshal(v.Interface())
	if err != nil {
		return node{kind: 's', text: "null"}
	}
	return node{kind: 's', text: string(b)}
}

func structTree(v reflect.Value) node {
	n := node{kind: 'm'}
	for i := range v.NumField() {
		sf := v.Type().Field(i)
		name := fieldName(sf)
		if name == "" {
			continue
		}
		if f := v.Field(i); f.Kind() == reflect.Pointer && f.IsNil() {
			continue // a section that is not there is not shown, so that what is shown loads
		}
		child := tree(v.Field(i), sf.Tag.Get("secret") == "true")
		if sf.Anonymous && child.kind == 'm' {
			n.items = append(n.items, child.items...)
			continue
		}
		n.items = append(n.items, item{name, child})
	}
	return n
}

func (n node) writeJSON(b *bytes.Buffer) {
	open, end := byte('{'), byte('}')
	switch n.kind {
	case 's':
		b.WriteString(n.text)
		return
	case 'l':
		open, end = '[', ']'
	}
	b.WriteByte(open)
	for i, it := range n.items {
		if i > 0 {
			b.WriteByte(',')
		}
		if n.kind == 'm' {
			b.WriteString(quoted(it.name).text)
			b.WriteByte(':')
		}
		it.node.writeJSON(b)
	}
	b.WriteByte(end)
}

// scalar is the node on one line of YAML. JSON text is YAML too, so only
// words that need no quotes are treated on their own.
func (n node) scalar() string {
	switch {
	case n.kind == 'm':
		return "{}"
	case n.kind == 'l':
		return "[]"
	case len(n.text) > 2 && n.text[0] == '"' && plain(n.text[1:len(n.text)-1]):
		return n.text[1 : len(n.text)-1]
	}
	return n.text
}

// plain says whether s means itself in YAML without quotes: a word that starts
// with a letter or "/" and is no keyword of YAML 1.1 or 1.2.
func plain(s string) bool {
	switch strings.ToLower(s) {
	case "true", "false", "yes", "no", "on", "off", "null", "y", "n":
		return false
	}
	for i, r := range s {
		letter := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r == '/'
		if !letter && (i == 0 || !(r >= '0' && r <= '9' || strings.ContainsRune("._-", r))) {
			return false
		}
	}
	return s != ""
}

func (n node) writeYAML(b *bytes.Buffer, depth int) {
	indent := strings.Repeat("  ", depth)
	for _, it := range n.items {
		b.WriteString(indent)
		if n.kind == 'l' {
			b.WriteString("-")
		} else {
			b.WriteString(node{kind: 's', text: quoted(it.name).text}.scalar() + ":")
		}
		if len(it.node.items) == 0 {
			b.WriteString(" " + it.node.scalar() + "\n")
			continue
		}
		b.WriteString("\n")
		it.node.writeYAML(b, depth+1)
	}
}
