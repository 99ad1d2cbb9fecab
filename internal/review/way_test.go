package review

import (
	"reflect"
	"slices"
	"testing"

	"sallyport/internal/mesh"
)

// TestEveryFactIsKnown has a destination with all its fields set say nothing that a
// test could not ask for.
func TestEveryFactIsKnown(t *testing.T) {
	var d mesh.Destination
	fill(reflect.ValueOf(&d).Elem())
	d.Host, d.Proto, d.TLS = "a.test", mesh.ProtoHTTP, mesh.Originate
	d.Endpoints, d.Parents = nil, nil
	w := &Way{}
	w.fields(d)
	known := knownFacts()
	if len(w.Facts) < 30 {
		t.Errorf("only %d facts: %v", len(w.Facts), w.Facts)
	}
	for _, f := range w.Facts {
		if !slices.Contains(known, f.Name) {
			t.Errorf("no test can ask for %s", f.Name)
		}
	}
}

// fill gives every field some value.
func fill(v reflect.Value) {
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem())
	case reflect.Struct:
		if isText(v.Type()) || v.Type() == originType {
			return
		}
		for i := range v.NumField() {
			fill(v.Field(i))
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		fill(v.Index(0))
	case reflect.String:
		v.SetString("x")
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int64:
		v.SetInt(7)
	case reflect.Uint8, reflect.Uint16, reflect.Uint32:
		v.SetUint(7)
	}
}
