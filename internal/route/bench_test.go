package route

import (
	"fmt"
	"testing"
	"time"

	"sallyport/internal/mesh"
)

var when = time.Date(2026, 11, 27, 12, 0, 0, 0, time.UTC)

// manyRoutes are n routes, half with an exact path and half with a prefix.
func manyRoutes(n int) mesh.Routes {
	var f mesh.Routes
	for i := range n / 2 {
		f.Routes = append(f.Routes, mesh.Route{Name: fmt.Sprintf("e%d", i), Matches: []mesh.Match{{Path: &mesh.Text{Exact: fmt.Sprintf("/svc%d/health", i)}}}},
			mesh.Route{Name: fmt.Sprintf("p%d", i), Backends: backends(9900, 100), Sticky: &mesh.Sticky{By: "cookie", Name: "sid"},
				Matches: []mesh.Match{{Path: &mesh.Text{Prefix: fmt.Sprintf("/svc%d/items", i)}}}})
	}
	return f
}

func BenchmarkMatch(b *testing.B) {
	for _, n := range []int{10, 1000, 10_000} {
		s := compiled(b, manyRoutes(n))
		for _, path := range []string{"/svc3/health", "/svc4/items/42"} {
			b.Run(fmt.Sprintf("%d%s", n, path), func(b *testing.B) {
				c := call("GET", path, "Host: billing.mesh.internal", "Accept: */*", "Cookie: sid=abcdef")
				b.ReportAllocs()
				for b.Loop() {
					ch := s.Match(c)
					ch.Backend(0)
				}
			})
		}
	}
}
