package mesh

import (
	"reflect"
	"strings"
)

// secretNames lists the fields tagged secret:"true" anywhere in a type.
func secretNames(t reflect.Type, names []string, seen map[reflect.Type]bool) []string {
	switch t.Kind() {
	case reflect.Pointer, reflect.Slice, reflect.Map:
		return secretNames(t.Elem(), names, seen)
	case reflect.Struct:
	default:
		return names
	}
	if seen[t] {
		return names
	}
	seen[t] = true
	for f := range t.Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		if f.Tag.Get("secret") == "true" {
			if name == "" {
				name = strings.ToLower(f.Name)
			}
			names = append(names, name)
		}
		names = secretNames(f.Type, names, seen)
	}
	return names
}

// hidden reports whether a line may hold a secret: because it names such a
// field, or nearly does, or stands below one that does. A mistake in the form
// of the file is found before fields are told apart, so the line decides.
func (d *decoder) hidden(line int) bool {
	if len(d.secrets) == 0 {
		return false
	}
	indent := 1 << 30
	for i := line - 1; i >= 0 && indent > 0; i-- {
		l := strings.TrimLeft(d.lines[i], " \t")
		in := len(d.lines[i]) - len(l)
		if l == "" || i < line-1 && in >= indent {
			continue
		}
		indent = in
		if d.namesSecret(l) {
			return true
		}
	}
	return false
}

func (d *decoder) namesSecret(line string) bool {
	for _, s := range d.secrets {
		if strings.Contains(line, s) {
			return true
		}
	}
	key, _, ok := strings.Cut(strings.TrimLeft(line, "- {?\"'"), ":")
	return ok && nearest(strings.ToLower(strings.Trim(key, " \"'")), d.secrets) != ""
}
