package main

import (
	"fmt"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/http1"
	"sallyport/internal/mesh"
	"sallyport/internal/route"
)

// matching is the way through routes of one service, half of them with an exact
// path and half with a prefix and two backends.
func matching() (out []part) {
	for _, n := range []int{10, 1000, 10_000} {
		set, err := routes(n)
		for _, call := range []struct{ name, path string }{{"exact", "/svc3/health"}, {"prefix", "/svc4/items/42"}, {"none", "/other"}} {
			c := &route.Call{Method: []byte("GET"), Path: []byte(call.path), Fields: []http1.Field{
				{Name: []byte("Host"), Value: []byte("billing.mesh.internal")}, {Name: []byte("Accept"), Value: []byte("*/*")},
				{Name: []byte("Cookie"), Value: []byte("sid=abcdef")}}}
			out = append(out, part{name: fmt.Sprintf("match_%s_%d", call.name, n), run: func(b *testing.B) {
				if err != nil {
					b.Fatal(err)
				}
				for b.Loop() {
					ch := set.Match(c)
					ch.Backend(0)
				}
			}, free: true})
		}
	}
	return out
}

func routes(n int) (*route.Set, error) {
	f := mesh.Routes{Service: "billing"}
	for i := range n / 2 {
		f.Routes = append(f.Routes,
			mesh.Route{Name: fmt.Sprintf("e%d", i), Matches: []mesh.Match{{Path: &mesh.Text{Exact: fmt.Sprintf("/svc%d/health", i)}}}},
			mesh.Route{Name: fmt.Sprintf("p%d", i), Matches: []mesh.Match{{Path: &mesh.Text{Prefix: fmt.Sprintf("/svc%d/items", i)}}},
				Backends: []mesh.Backend{{Weight: 9900}, {Service: "canary", Weight: 100}}, Sticky: &mesh.Sticky{By: "cookie", Name: "sid"}})
	}
	table, err := route.Compile(&mesh.Snapshot{TrustDomain: spiffeid.RequireTrustDomainFromString("bench.test"), Routes: []mesh.Routes{f}}, route.Options{})
	if err != nil {
		return nil, err
	}
	return table.Of("billing"), nil
}
