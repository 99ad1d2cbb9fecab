package route

import (
	"testing"

	"sallyport/internal/mesh"
)

// TestOrder looks at the first of each order, and at what comes after it.
func TestOrder(t *testing.T) {
	list := []mesh.Outlet{{Address: "a:1", Priority: 1}, {Address: "b:1", Weight: 3}, {Address: "c:1"}}
	first := map[string]int{}
	const keys = 10_000
	for k := range uint64(keys) {
		o := Order(list, mix(k))
		if len(o) != 3 || o[2].Address != "a:1" {
			t.Fatalf("key %d: %v", k, o)
		}
		first[o[0].Address]++
	}
	if n := first["b:1"]; n < keys*3/4-300 || n > keys*3/4+300 {
		t.Errorf("first were %v", first)
	}
}
