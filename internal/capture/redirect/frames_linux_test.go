package redirect

import (
	"net"
	"os/exec"
	"testing"

	"sallyport/internal/meshtest"
)

// TestFramesAreHeld has a workload that may open sockets of any kind write its own
// frames, which the rules for packets do not see.
func TestFramesAreHeld(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	manyUsers(t)
	ip := meshtest.Need(t, "ip")
	other := newPeer(t, ip)
	link := func(args ...string) {
		t.Helper()
		if out, err := exec.CommandContext(t.Context(), ip, append([]string{"link"}, args...)...).CombinedOutput(); err != nil {
			t.Fatalf("ip link %v: %v %s", args, err, out)
		}
	}
	serve(t, "10.77.0.1:22", func(net.Conn) string { return "another" })
	check(t, "",
		attempt{workloadUID, "frame near", "sent", "there are no rules yet"},
		attempt{workloadUID, "frame-direct near", "sent", "nor for what goes past the queue"},
	)
	c := byUser()
	h := install(t, c)
	if !h.Frames() {
		t.Fatal("frames are not held")
	}
	check(t, "",
		attempt{workloadUID, "frame near", "refused", "a frame of the workload"},
		attempt{workloadUID, "frame-direct near", "refused", "one that goes past the queue"},
		attempt{strangerUID, "frame near", "sent", "another user is not captured"},
	)
	other("10.77.0.1:22", "another") // what the stack sends has a route
	// As if a neighbour said that it was the machine itself.
	if out, err := exec.CommandContext(t.Context(), ip, "neigh", "replace", "127.0.0.1", "lladdr", "02:00:00:00:00:07", "dev", "near", "nud", "permanent").CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	check(t, "", attempt{workloadUID, "brief device 10.77.0.2:443 near", "refused", "what is bound to an interface does not leave by it on its way to the door"})
	s, err := Look(c)
	if err != nil || s.Frames != 1 || s.RefusedFrames < 3 || s.Digest != h.Digest() {
		t.Errorf("state %+v, %v, want one interface, three frames and the digest %s", s, err, h.Digest())
	}

	link("add", "late", "type", "veth", "peer", "name", "peer")
	link("set", "late", "up")
	link("set", "peer", "up")
	check(t, "", attempt{workloadUID, "frame late", "sent", "an interface that nobody knew of"})
	again := mustRules(t, c)
	if again.Digest() == h.Digest() {
		t.Error("another interface makes no difference to the digest")
	}
	if err := h.Replace(again); err != nil {
		t.Fatal(err)
	}
	check(t, "", attempt{workloadUID, "frame late", "refused", "it is known by now"})

	link("del", "late")
	if err := h.Replace(mustRules(t, c)); err != nil {
		t.Errorf("after an interface has gone: %v", err)
	}
	everybody := everyone()
	if err := h.Replace(mustRules(t, everybody)); err != nil {
		t.Fatal(err)
	}
	check(t, "",
		attempt{workloadUID, "frame near", "refused", "everyone is held"},
		attempt{strangerUID, "frame-direct near", "refused", "everyone is held"},
		attempt{0, "frame near", "refused", "the sidecar has no use for frames"},
	)
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	check(t, "", attempt{workloadUID, "frame near", "refused", "the rules outlive their holder"})
	if removed, err := Remove(everybody); err != nil || !removed {
		t.Fatal(removed, err)
	}
	check(t, "", attempt{workloadUID, "frame near", "sent", "the rules are gone"})
}
