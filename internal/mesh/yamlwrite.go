package mesh

import (
	"encoding"
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"time"
)

// EncodeYAML writes routes as a file of policies/routes that reads as they are.
func (r *Routes) EncodeYAML() []byte {
	var b strings.Builder
	writeFields(&b, reflect.ValueOf(*r), "")
	return []byte(b.String())
}

// writeFields writes the fields of a struct that are set, each on a line that
// begins with indent.
func writeFields(b *strings.Builder, v reflect.Value, indent string) {
	for i := range v.NumField() {
		sf, f := v.Type().Field(i), v.Field(i)
		if sf.Type == originType || sf.Tag.Get("yaml") == "-" {
			continue
		}
		name, _, _ := strings.Cut(sf.Tag.Get("json"), ",")
		// A weight of 0 is not the one that is left out.
		if f.IsZero() && name != "weight" && name != "attempts" {
			continue
		}
		if sf.Anonymous && name == "" {
			writeFields(b, f, indent)
			continue
		}
		writeField(b, name, f, indent)
	}
}

func writeField(b *strings.Builder, name string, v reflect.Value, indent string) {
	if v.Kind() == reflect.Pointer {
		v = v.Elem()
	}
	if text, ok := scalarOf(v); ok {
		fmt.Fprintf(b, "%s%s: %s\n", indent, name, text)
		return
	}
	fmt.Fprintf(b, "%s%s:\n", indent, name)
	switch v.Kind() {
	case reflect.Struct:
		writeFields(b, v, indent+"  ")
	case reflect.Map:
		for _, k := range sortedKeysOf(v) {
			writeField(b, strconv.Quote(k), v.MapIndex(reflect.ValueOf(k)), indent+"  ")
		}
	case reflect.Slice:
		for i := range v.Len() {
			if text, ok := scalarOf(v.Index(i)); ok {
				fmt.Fprintf(b, "%s  - %s\n", indent, text)
				continue
			}
			var item strings.Builder
			writeFields(&item, v.Index(i), indent+"    ")
			if item.Len() == 0 {
				fmt.Fprintf(b, "%s  - {}\n", indent)
			} else {
				fmt.Fprintf(b, "%s  - %s", indent, strings.TrimPrefix(item.String(), indent+"    "))
			}
		}
	}
}

func sortedKeysOf(v reflect.Value) []string {
	m := map[string]bool{}
	for _, k := range v.MapKeys() {
		m[k.String()] = true
	}
	return sortedKeys(m)
}

// scalarOf writes what fits on a line.
func scalarOf(v reflect.Value) (string, bool) {
	switch x := v.Interface().(type) {
	case time.Duration:
		return x.String(), true
	case encoding.TextMarshaler:
		t, err := x.MarshalText()
		return strconv.Quote(string(t)), err == nil
	}
	switch v.Kind() {
	case reflect.String:
		return strconv.Quote(v.String()), true
	case reflect.Struct, reflect.Map, reflect.Slice:
		return "", false
	}
	return fmt.Sprint(v.Interface()), true
}
