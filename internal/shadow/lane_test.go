package shadow

import (
	"context"
	"log/slog"
	"testing"

	"sallyport/internal/mesh"
)

// A call is not copied for a shadow that has no room for it, and is for the others.
func TestACallIsNotCopiedWhereThereIsNoRoom(t *testing.T) {
	lent := make(chan struct{}, 1)
	m, err := New(Config{
		Limits: Limits{Concurrency: 1, Queue: 1}, Dir: t.TempDir(), Log: slog.New(slog.DiscardHandler),
		Lend: func(ctx context.Context, _ mesh.Backend, _ bool) (Line, error) {
			lent <- struct{}{}
			<-ctx.Done()
			return Line{}, ctx.Err()
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	m.ctx = ctx // as Run does; nothing here is so large that it has to write it
	t.Cleanup(func() { stop(); m.stop() })
	call := Call{Service: "billing", Route: "all", Dst: "spiffe://a.test/billing", Method: "GET"}
	slow, other := &mesh.Shadow{Name: "slow"}, &mesh.Shadow{Name: "other"}
	for i := range 2 {
		c := m.Copy([]*mesh.Shadow{slow}, call)
		if c == nil {
			t.Fatalf("call %d is not copied", i)
		}
		c.Sent([]byte("GET / HTTP/1.1\r\nHost: a.test\r\n\r\n"))
		c.End(true, true)
		if i == 0 {
			<-lent // it is under way, so that the next one waits
		}
	}
	if c := m.Copy([]*mesh.Shadow{slow}, call); c != nil {
		t.Error("a call is copied for a shadow that has no room")
	}
	if c := m.Copy([]*mesh.Shadow{slow, other}, call); c == nil || len(c.shadows) != 1 || c.shadows[0] != other {
		t.Errorf("one shadow without room and one with it: %+v", c)
	} else {
		c.End(false, false)
	}
}
