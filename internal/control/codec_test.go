package control

import (
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"sallyport/internal/control/meshpb"
)

// TestWhatIsEncodedOnceIsWhatWouldBeSent to each reader, and a message that is
// not passes as ever.
func TestWhatIsEncodedOnceIsWhatWouldBeSent(t *testing.T) {
	s := snapshot(t, 7, 3, "GET")
	pr, err := new(projections).of(s, KindSidecar, billing)
	if err != nil {
		t.Fatal(err)
	}
	c := newCodec()
	whole := &meshpb.SubscribeResponse{Message: &meshpb.SubscribeResponse_Snapshot{Snapshot: pr.msg}}
	same := &meshpb.SubscribeResponse{Message: &meshpb.SubscribeResponse_Same{Same: &meshpb.Same{Revision: 7, PolicyRevision: 3, PolicyHash: s.PolicyHash}}}
	for name, tt := range map[string]struct {
		sent any
		want proto.Message
	}{"whole": {pr.whole, whole}, "same": {pr.same, same}, "not encoded": {same, same}} {
		b, err := c.Marshal(tt.sent)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		got := new(meshpb.SubscribeResponse)
		if err := c.Unmarshal(b, got); err != nil || !proto.Equal(got, tt.want) {
			t.Errorf("%s: %v, got %v, want %v", name, err, got, tt.want)
		}
	}
	if _, err := c.Marshal("a string"); err == nil {
		t.Error("what is no message was encoded")
	}
}

// burst is a stream whose peer has sent so many messages already.
type burst struct {
	grpc.BidiStreamingServer[meshpb.SubscribeRequest, meshpb.SubscribeResponse]
	left int
}

func (b *burst) Recv() (*meshpb.SubscribeRequest, error) {
	if b.left == 0 {
		return nil, io.EOF
	}
	b.left--
	return new(meshpb.SubscribeRequest), nil
}

// TestOnlyAHastyPeerWaits for its messages to be taken.
func TestOnlyAHastyPeerWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const gap = time.Second
		start, at := time.Now(), []time.Duration(nil)
		got, ended := receive(t.Context(), &burst{left: 4}, gap)
		for {
			select {
			case <-got:
				if at = append(at, time.Since(start)); len(at) == 2 {
					time.Sleep(3 * gap) // whoever takes it is slow, which is no haste of the peer
				}
				continue
			case err := <-ended:
				if err != nil && !errors.Is(err, io.EOF) {
					t.Error(err)
				}
			}
			break
		}
		if want := []time.Duration{0, gap, 4 * gap, 5 * gap}; !slices.Equal(at, want) {
			t.Errorf("messages at %v, want %v", at, want)
		}
	})
}

func TestVersionOfAStranger(t *testing.T) {
	for in, want := range map[string]string{
		"8516054f0c1a+changes go1.26.5": "8516054f0c1a+changes go1.26.5", "": "", "a\x1b[2Jb": "", "v1\n": "", "vé": "",
		strings.Repeat("v", maxVersion+1): "",
	} {
		if got := versionFromWire(in); got != want {
			t.Errorf("%q is %q, want %q", in, got, want)
		}
	}
}
