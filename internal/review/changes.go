package review

import (
	"cmp"
	"crypto/sha256"
	"encoding"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"sallyport/internal/mesh"
)

// A Change is a noun of the policy files, other than a row of access, that one
// set has and the other has not, or has otherwise.
type Change struct {
	// Kind says what it is, such as "service" or "token issuer".
	Kind string `json:"kind"`
	Name string `json:"name"`
	// What is Added, Removed or Edited.
	What   string  `json:"what"`
	Fields []Field `json:"fields,omitempty"`
}

// The values of Change.What.
const (
	Added   = "added"
	Removed = "removed"
	Edited  = "edited"
)

// A Field is what a change says of one field, as text; empty where it was or is
// not written.
type Field struct {
	Name string `json:"name"`
	Was  string `json:"was,omitempty"`
	Is   string `json:"is,omitempty"`
}

// kinds are the names of what stands in a list, by the JSON name of the list.
// A list that is not here is called by that name.
var kinds = map[string]string{
	"services": "service", "destinations": "egress destination", "entries": "entry",
	"cases": "test", "admin": "admin row", "issuers": "token issuer", "api_keys": "API key",
	"revoked": "revoked token", "dpop": "DPoP", "routes": "route", "modes": "mode",
	"routes of": "routes", "rows": "candidate row", "groups": "candidate group",
}

// judged are the lists whose meaning Diff compares.
var judged = []string{"rules", "memberships"}

// Changes lists what differs between two sets beside the access that Diff
// shows. Where it is written makes no difference.
func Changes(old, new *mesh.Policies) []Change {
	var out []Change
	fieldwise(reflect.ValueOf(*old), reflect.ValueOf(*new), "", &out)
	slices.SortStableFunc(out, func(a, b Change) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Name, b.Name))
	})
	return out
}

// fieldwise compares structs of lists, such as Policies and Tokens. What in
// them is no list is a change of the struct itself, called name.
func fieldwise(was, is reflect.Value, name string, out *[]Change) {
	var own []Field
	for i := range was.NumField() {
		label := labelOf(was.Type().Field(i))
		if was.Type() == policiesType && label == "routes" {
			label = "routes of" // tokens.yaml has routes too
		}
		if label == "" || slices.Contains(judged, label) {
			continue
		}
		a, b := was.Field(i), is.Field(i)
		switch {
		case a.Kind() == reflect.Slice && a.Type().Elem().Kind() == reflect.Struct && !isText(a.Type().Elem()):
			listwise(a, b, cmp.Or(kinds[label], label), out)
		case a.Kind() == reflect.Pointer:
			zero := reflect.Zero(a.Type().Elem())
			x, y := zero, zero
			if !a.IsNil() {
				x = a.Elem()
			}
			if !b.IsNil() {
				y = b.Elem()
			}
			fieldwise(x, y, label, out)
		default:
			own = append(own, differing(map[string]string{}, map[string]string{}, label, a, b)...)
		}
	}
	if len(own) > 0 {
		*out = append(*out, Change{Kind: cmp.Or(name, "policies"), Name: "settings", What: Edited, Fields: own})
	}
}

// listwise pairs the elements of two lists by name. Elements of one name are
// paired when they are equal, and then in their order.
func listwise(was, is reflect.Value, kind string, out *[]Change) {
	type named struct {
		name, text string
		fields     map[string]string
	}
	read := func(list reflect.Value) []named {
		var all []named
		for i := range list.Len() {
			f := map[string]string{}
			flatten(list.Index(i), "", f)
			all = append(all, named{nameOf(list.Index(i)), fmt.Sprint(f), f})
		}
		return all
	}
	left, right := read(was), read(is)
	for i := 0; i < len(left); {
		same := slices.IndexFunc(right, func(n named) bool { return n.name == left[i].name && n.text == left[i].text })
		if same < 0 {
			i++
			continue
		}
		left, right = slices.Delete(left, i, i+1), slices.Delete(right, same, same+1)
	}
	for _, l := range left {
		c := Change{Kind: kind, Name: l.name, What: Removed}
		if at := slices.IndexFunc(right, func(n named) bool { return n.name == l.name }); at >= 0 {
			c.What, c.Fields = Edited, fieldsOf(l.fields, right[at].fields)
			right = slices.Delete(right, at, at+1)
		} else {
			c.Fields = fieldsOf(l.fields, nil)
		}
		*out = append(*out, c)
	}
	for _, r := range right {
		*out = append(*out, Change{Kind: kind, Name: r.name, What: Added, Fields: fieldsOf(nil, r.fields)})
	}
}

func differing(was, is map[string]string, label string, a, b reflect.Value) []Field {
	flatten(a, label, was)
	flatten(b, label, is)
	return fieldsOf(was, is)
}

// fieldsOf lists the fields that differ, by name.
func fieldsOf(was, is map[string]string) []Field {
	var out []Field
	for name, text := range was {
		if is[name] != text {
			out = append(out, Field{name, text, is[name]})
		}
	}
	for name, text := range is {
		if _, both := was[name]; !both {
			out = append(out, Field{Name: name, Is: text})
		}
	}
	slices.SortFunc(out, func(a, b Field) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

// names are the fields that tell elements of a list apart, the best first. The
// id of an entry is a hash of all of it unless written, so that it comes after
// the identity.
var names = []string{"name", "spiffe_id", "identity", "host", "issuer", "trust_domain", "file", "id", "member", "service"}

func nameOf(v reflect.Value) string {
	texts := map[string]string{}
	flatten(v, "", texts)
	for _, n := range names {
		if texts[n] != "" {
			return texts[n]
		}
	}
	return "unnamed"
}

// flatten writes each field that is set as text, nested ones as "outer.inner".
// Of what could be a secret the beginning is enough to tell one from another.
func flatten(v reflect.Value, label string, out map[string]string) {
	if v.IsZero() {
		return
	}
	switch {
	case v.Kind() == reflect.Struct && !isText(v.Type()):
		for i := range v.NumField() {
			if l := labelOf(v.Type().Field(i)); l == inlined {
				flatten(v.Field(i), label, out)
			} else if l != "" {
				flatten(v.Field(i), strings.TrimPrefix(label+"."+l, "."), out)
			}
		}
	case v.Kind() == reflect.Pointer:
		flatten(v.Elem(), label, out)
	case v.Kind() == reflect.Slice && v.Type().Elem().Kind() == reflect.Struct && !isText(v.Type().Elem()):
		for i := range v.Len() {
			flatten(v.Index(i), fmt.Sprintf("%s[%s]", label, placeOf(v.Index(i), i)), out)
		}
	case v.Kind() == reflect.Map:
		for _, k := range v.MapKeys() {
			flatten(v.MapIndex(k), label+"."+fmt.Sprint(k), out)
		}
	case v.Kind() == reflect.Slice && v.Type().Elem().Kind() == reflect.Uint8:
		out[label] = fmt.Sprintf("%d bytes, sha256 %.8x", v.Len(), sha256.Sum256(v.Bytes()))
	case v.Kind() == reflect.Slice:
		parts := make([]string, v.Len())
		for i := range parts {
			parts[i] = textOf(v.Index(i))
		}
		if label == "hashes" {
			for i, p := range parts {
				parts[i] = shortHash(p)
			}
		}
		out[label] = strings.Join(parts, ", ")
	default:
		out[label] = textOf(v)
	}
}

// fieldsOfNoun flattens a noun.
func fieldsOfNoun(noun any) map[string]string {
	out := map[string]string{}
	flatten(reflect.ValueOf(noun), "", out)
	return out
}

// placeOf is the name of an element, or its place when it has none.
func placeOf(v reflect.Value, i int) string {
	if f := v.FieldByName("Name"); f.IsValid() && f.String() != "" {
		return f.String()
	}
	return fmt.Sprint(i)
}

// shortHash leaves of a hash what tells two of them apart.
func shortHash(h string) string {
	if i := strings.LastIndexAny(h, ":$"); i >= 0 && len(h) > i+9 {
		return h[:i+9] + "…"
	}
	return h
}

var (
	textMarshaler = reflect.TypeFor[encoding.TextMarshaler]()
	stringer      = reflect.TypeFor[fmt.Stringer]()
	originType    = reflect.TypeFor[mesh.Origin]()
	policiesType  = reflect.TypeFor[mesh.Policies]()
)

func isText(t reflect.Type) bool { return t.Implements(textMarshaler) || t.Implements(stringer) }

func textOf(v reflect.Value) string {
	if m, ok := v.Interface().(encoding.TextMarshaler); ok {
		if b, err := m.MarshalText(); err == nil {
			return string(b)
		}
	}
	return fmt.Sprint(v.Interface())
}

// inlined is the label of a struct whose fields count as those around it.
const inlined = "."

// labelOf is the JSON name of a field; empty for what says where it is written.
func labelOf(f reflect.StructField) string {
	if f.Type == originType || !f.IsExported() {
		return ""
	}
	label, _, _ := strings.Cut(f.Tag.Get("json"), ",")
	if f.Anonymous && label == "" {
		return inlined
	}
	return label
}
