package egress

import (
	"testing"

	"sallyport/internal/mesh"
	"sallyport/internal/telemetry"
)

// TestARefusedHostIsCountedForItsDestination asks for hosts that a caller made
// up: they must not become edges of the map.
func TestARefusedHostIsCountedForItsDestination(t *testing.T) {
	snap := &mesh.Snapshot{Destinations: []mesh.Destination{{Host: "*.listed.example"}}}
	g := &Gateway{cfg: Config{Edges: telemetry.NewEdges(), Snapshot: func() *mesh.Snapshot { return snap }}}
	for _, host := range []string{"r1.example", "r2.example", "a.listed.example", "b.listed.example"} {
		g.edge("web", "host:"+host, telemetry.Denied)
	}
	g.edge("web", "host:c.listed.example", telemetry.Allowed)
	got := map[string]uint64{}
	for _, e := range g.cfg.Edges.Flush() {
		got[e.Dst] = 10*e.Denied + e.Allowed
	}
	if len(got) != 3 || got["host:other"] != 20 || got["host:*.listed.example"] != 20 || got["host:c.listed.example"] != 1 {
		t.Errorf("edges %v", got)
	}
}
