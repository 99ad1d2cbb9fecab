package control

import (
	"context"
	"sync"
	"testing"

	"sallyport/internal/control/meshpb"
)

// Every message counts, those of a stream one by one: an idle proxy that spoke
// too often on its stream would otherwise look quiet.
func TestMessagesAreCounted(t *testing.T) {
	var mu sync.Mutex
	got := map[string]int{}
	r := newRig(t, newCA(t, td), func(c *ServerConfig) {
		c.OnMessage = func(method string) {
			mu.Lock()
			defer mu.Unlock()
			got[method]++
		}
	})
	c, _ := r.joined("node-b")
	ctx, cancel := context.WithCancel(t.Context())
	arrived := make(stamped, 1)
	ended := make(chan error, 1)
	go func() { ended <- c.Subscribe(ctx, Hello{Kind: KindSidecar, Workload: billing}, arrived) }()
	<-arrived
	for p := range r.reg.reported { // of the hello first, then of the ack
		if p.PolicyRevision > 0 {
			break
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	mu.Lock()
	defer mu.Unlock()
	if n := got[meshpb.Mesh_Subscribe_FullMethodName]; n != 2 {
		t.Errorf("%d messages of a subscription, want the hello and the ack: %v", n, got)
	}
}
