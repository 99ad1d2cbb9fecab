package jose

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// MaxDepth is how deep JSON may nest that strangers send.
const MaxDepth = 8

// An Object is one JSON object, read strictly: names are compared as they
// stand, none comes twice at any depth, and numbers are json.Number.
type Object map[string]any

// ParseObject reads exactly one object. No error quotes the text. How long it
// may be is for the caller to say.
func ParseObject(b []byte) (Object, error) {
	return parseObject(b, &jsonReader{members: len(b)})
}

// A jsonReader counts what is left of the limits while it reads.
type jsonReader struct {
	d       *json.Decoder
	members int  // that may still come: of objects and of lists
	plain   bool // texts hold neither control characters nor U+FFFD, which stands for what is no character
}

func parseObject(b []byte, r *jsonReader) (Object, error) {
	if !utf8.Valid(b) {
		return nil, errors.New("not UTF-8")
	}
	r.d = json.NewDecoder(bytes.NewReader(b))
	r.d.UseNumber()
	v, err := r.value(0)
	if err != nil {
		return nil, err
	}
	o, ok := v.(map[string]any)
	if !ok {
		return nil, errors.New("not a JSON object")
	}
	if _, err := r.d.Token(); err != io.EOF {
		return nil, errors.New("bytes after the JSON object")
	}
	return o, nil
}

func (r *jsonReader) value(depth int) (any, error) {
	t, err := r.d.Token()
	if err != nil {
		return nil, errors.New("malformed JSON")
	}
	if t != json.Delim('{') && t != json.Delim('[') {
		return t, r.text(t)
	}
	if depth == MaxDepth {
		return nil, fmt.Errorf("JSON nested deeper than %d", MaxDepth)
	}
	fields, list := map[string]any{}, []any{}
	for r.d.More() {
		if r.members--; r.members < 0 {
			return nil, errors.New("too many members in JSON")
		}
		name := ""
		if t == json.Delim('{') {
			k, err := r.d.Token()
			if err != nil {
				return nil, errors.New("malformed JSON")
			}
			if err := r.text(k); err != nil {
				return nil, err
			}
			name, _ = k.(string) // the decoder allows nothing else before a colon
			if _, twice := fields[name]; twice {
				return nil, errors.New("duplicate name in JSON")
			}
		}
		v, err := r.value(depth + 1)
		if err != nil {
			return nil, err
		}
		if t == json.Delim('{') {
			fields[name] = v
		} else {
			list = append(list, v)
		}
	}
	if _, err := r.d.Token(); err != nil {
		return nil, errors.New("malformed JSON")
	}
	if t == json.Delim('{') {
		return fields, nil
	}
	return list, nil
}

func (r *jsonReader) text(t json.Token) error {
	s, ok := t.(string)
	if ok && r.plain && strings.ContainsFunc(s, func(c rune) bool { return c < ' ' || c == 0x7f || c == utf8.RuneError }) {
		return errors.New("a text holds a control character or half of one")
	}
	return nil
}

// Only refuses names beside those given.
func (o Object) Only(names ...string) error {
	for k := range o {
		if !slices.Contains(names, k) {
			return fmt.Errorf("has a name beside %s", strings.Join(names, ", "))
		}
	}
	return nil
}

// Text gives a string that must be there and not be empty.
func (o Object) Text(name string) (string, error) {
	s, ok := o[name].(string)
	if !ok || s == "" {
		return "", fmt.Errorf("%s is missing or not a text", name)
	}
	return s, nil
}

// Child gives the object under a name; an empty one when there is none.
func (o Object) Child(name string) Object {
	c, _ := o[name].(map[string]any)
	return c
}

// Texts gives what may be one string or a list of 1 to limit strings, none of
// them empty. It is nil without an error when the name is not there.
func (o Object) Texts(name string, limit int) ([]string, error) {
	v, has := o[name]
	if !has {
		return nil, nil
	}
	list, ok := v.([]any)
	if s, one := v.(string); one {
		list, ok = []any{s}, true
	}
	if !ok || len(list) == 0 || len(list) > limit {
		return nil, fmt.Errorf("%s is not 1 to %d texts", name, limit)
	}
	out := make([]string, len(list))
	for i, e := range list {
		if out[i], ok = e.(string); !ok || out[i] == "" {
			return nil, fmt.Errorf("%s holds something else than texts", name)
		}
	}
	return out, nil
}

// Time gives whole seconds above 0 and below 2^53, so that no value can
// overflow into the past. A fraction or an exponent is an error, although
// RFC 7519 allows them: no issuer writes them, and readers disagree on them.
func (o Object) Time(name string) (at time.Time, has bool, err error) {
	v, has := o[name]
	if !has {
		return time.Time{}, false, nil
	}
	n, ok := v.(json.Number)
	if !ok {
		return time.Time{}, true, fmt.Errorf("%s is not a number", name)
	}
	s, err := strconv.ParseInt(n.String(), 10, 64)
	if err != nil || s <= 0 || s >= 1<<53 {
		return time.Time{}, true, fmt.Errorf("%s is not a whole number of seconds in range", name)
	}
	return time.Unix(s, 0), true, nil
}

// Decode64 is strict: the decoder of the library skips line ends, and bits
// after the last byte unless asked.
func Decode64(e *base64.Encoding, s string) ([]byte, error) {
	if strings.ContainsAny(s, "\r\n") {
		return nil, errors.New("base64 with a line end")
	}
	b, err := e.Strict().DecodeString(s)
	if err != nil {
		return nil, errors.New("malformed base64")
	}
	return b, nil
}
