package mesh

import (
	"encoding"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"
)

// wrong reports a node of the wrong type.
func (d *decoder) wrong(n ast.Node, name, want string) {
	d.at(nodeToken(n), "%s is %s, want %s", cmpName(name), nodeKind(n), want)
}

func nodeKind(n ast.Node) string {
	switch n.Type() {
	case ast.IntegerType, ast.FloatType, ast.InfinityType, ast.NanType:
		return "a number"
	case ast.BoolType:
		return "true or false"
	case ast.StringType, ast.LiteralType:
		return "text"
	case ast.SequenceType:
		return "a list"
	case ast.MappingType, ast.MappingValueType:
		return "a group of fields"
	}
	return "something else"
}

// scalarText returns the text of a scalar as written, quotes resolved.
func scalarText(n ast.Node) (string, bool) {
	switch s := n.(type) {
	case *ast.StringNode:
		return s.Value, true
	case *ast.LiteralNode:
		return s.Value.Value, true
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode:
		return n.GetToken().Value, true
	}
	return "", false
}

func (d *decoder) text(n ast.Node, u encoding.TextUnmarshaler, name string) {
	s, ok := scalarText(n)
	if !ok {
		d.wrong(n, name, "text")
		return
	}
	if s == "" {
		d.at(n.GetToken(), "%s has no value: give one or leave the line out", cmpName(name))
		return
	}
	err := u.UnmarshalText([]byte(s))
	switch {
	case err == nil:
	case d.secret:
		d.at(n.GetToken(), "%s is malformed", cmpName(name))
	default:
		d.at(n.GetToken(), "%s: %s", cmpName(name), textMistake(u, s, err))
	}
}

// textMistake says what is wrong with a text, and for the types of the
// standard library what would be right.
func textMistake(u encoding.TextUnmarshaler, s string, err error) string {
	want := ""
	switch u.(type) {
	case *time.Time:
		want = "a time like 2027-01-31T18:00:00Z"
	case *netip.Prefix:
		want = "a range like 10.1.0.0/16"
	case *netip.AddrPort:
		want = "an address and a port like 127.0.0.1:8443"
	case *netip.Addr:
		want = "an address like 127.0.0.1"
	}
	if want != "" {
		return fmt.Sprintf("%q is not %s", clip(s), want)
	}
	msg := oneLine(err)
	if strings.Contains(msg, strconv.Quote(clip(s))) {
		return msg
	}
	return fmt.Sprintf("%q: %s", clip(s), msg)
}

// clip shortens a value that is shown in a message.
func clip(s string) string {
	const longest = 80
	if r := []rune(s); len(r) > longest {
		return string(r[:longest]) + "..."
	}
	return s
}

func (d *decoder) duration(n ast.Node, v reflect.Value, name string) {
	s, ok := scalarText(n)
	if !ok {
		d.wrong(n, name, "a duration such as 5s")
		return
	}
	t, err := time.ParseDuration(s)
	if err != nil {
		d.at(n.GetToken(), "%s: %q is not a duration: write a number with a unit, such as 5s or 10m", cmpName(name), clip(s))
		return
	}
	v.SetInt(int64(t))
}

func (d *decoder) scalar(n ast.Node, v reflect.Value, name string) {
	switch v.Kind() {
	case reflect.String:
		switch s := n.(type) {
		case *ast.StringNode:
			v.SetString(s.Value)
		case *ast.LiteralNode:
			v.SetString(s.Value.Value)
		case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode:
			d.wrong(n, name, "text: put it in quotes")
		default:
			d.wrong(n, name, "text")
		}
	case reflect.Bool:
		b, ok := n.(*ast.BoolNode)
		if !ok {
			d.wrong(n, name, "true or false")
			return
		}
		v.SetBool(b.Value)
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64,
		reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		d.integer(n, v, name)
	case reflect.Float32, reflect.Float64:
		d.float(n, v, name)
	default:
		d.at(n.GetToken(), "%s: values of type %s cannot be decoded", cmpName(name), v.Type())
	}
}

// integer accepts decimal digits only: YAML reads 010 as eight and 0x1F as 31,
// which nobody reviewing a port expects.
func (d *decoder) integer(n ast.Node, v reflect.Value, name string) {
	if n.Type() != ast.IntegerType {
		d.wrong(n, name, "a whole number")
		return
	}
	raw := n.GetToken().Value
	if digits := strings.TrimLeft(raw, "+-"); len(digits) > 1 && digits[0] == '0' {
		d.at(n.GetToken(), "%s: %q is not a plain decimal number", cmpName(name), clip(raw))
		return
	}
	bits := v.Type().Bits()
	var err error
	if v.CanInt() {
		var i int64
		if i, err = strconv.ParseInt(raw, 10, bits); err == nil {
			v.SetInt(i)
		}
	} else {
		var u uint64
		if u, err = strconv.ParseUint(raw, 10, bits); err == nil {
			v.SetUint(u)
		}
	}
	if err != nil {
		d.at(n.GetToken(), "%s: %q is not a whole number %s", cmpName(name), clip(raw), rangeOf(v))
	}
}

func rangeOf(v reflect.Value) string {
	bits := v.Type().Bits()
	if v.CanInt() {
		return "of at most " + strconv.Itoa(bits) + " bits"
	}
	return "from 0 to " + strconv.FormatUint(^uint64(0)>>(64-bits), 10)
}

func (d *decoder) float(n ast.Node, v reflect.Value, name string) {
	if n.Type() != ast.FloatType && n.Type() != ast.IntegerType {
		d.wrong(n, name, "a number")
		return
	}
	f, err := strconv.ParseFloat(n.GetToken().Value, v.Type().Bits())
	if err != nil {
		d.at(n.GetToken(), "%s: %q is not a decimal number", cmpName(name), clip(n.GetToken().Value))
		return
	}
	v.SetFloat(f)
}

func sortedKeys[V any](m map[string]V) []string {
	return slices.Sorted(maps.Keys(m))
}
