package meshtest

import (
	"net/netip"
	"testing"
	"testing/fstest"

	"sallyport/internal/mesh"
)

// Policies parses reviewed files given as text by name, such as "access.csv",
// for TD. A missing access.csv is taken as empty.
func Policies(t testing.TB, files map[string]string) *mesh.Policies {
	t.Helper()
	folder := fstest.MapFS{"access.csv": {}}
	for name, text := range files {
		folder[name] = &fstest.MapFile{Data: []byte(text)}
	}
	p, err := mesh.ParseFS(folder, TD)
	if err != nil {
		t.Fatalf("parse policies: %v", err)
	}
	return p
}

// Snapshot compiles reviewed files and endpoints as revision 1.
func Snapshot(t testing.TB, files map[string]string, endpoints ...mesh.Endpoint) *mesh.Snapshot {
	t.Helper()
	s, err := mesh.Compile(Policies(t, files), 1, 1, endpoints)
	if err != nil {
		t.Fatalf("compile policies: %v", err)
	}
	return s
}

// Endpoint is the place of a service at an address such as "10.0.0.1:15006",
// announced by the agent of the same name.
func Endpoint(t testing.TB, service mesh.ServiceName, address string) mesh.Endpoint {
	t.Helper()
	a, err := netip.ParseAddrPort(address)
	if err != nil {
		t.Fatalf("parse address: %v", err)
	}
	return mesh.Endpoint{Service: service, Address: a, Agent: AgentID(string(service))}
}
