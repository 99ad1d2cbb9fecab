package page

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"testing"
	"time"

	"sallyport/internal/mux"
)

// Who waits for the provider's answer to another, and goes, holds nothing.
func TestWhoGoesWaitsForNoProvider(t *testing.T) {
	o, err := newProvider(OIDC{Issuer: "https://login.test", URL: "https://page.test", Client: "page", Viewers: []string{"staff"}}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	o.turn <- struct{}{} // somebody asks
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := o.discover(ctx, time.Now()); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	<-o.turn
}

// No address has all the turns at the provider.
func TestTurnsAtTheProviderAreShared(t *testing.T) {
	var d redeems
	d.init()
	of := func(text string) mux.Source {
		return mux.SourceOf(net.TCPAddrFromAddrPort(netip.MustParseAddrPort(text)))
	}
	var leaves []func()
	enter := func(text string) bool {
		leave, ok := d.enter(of(text))
		if ok {
			leaves = append(leaves, leave)
		}
		return ok
	}
	for i := range maxRedeemsEach + 1 {
		if ok := enter("192.0.2.1:1"); ok != (i < maxRedeemsEach) {
			t.Errorf("turn %d of one address: %t", i, ok)
		}
	}
	for _, text := range []string{"192.0.2.2:1", "192.0.2.2:2", "192.0.2.3:1", "192.0.2.3:2", "192.0.2.4:1", "192.0.2.4:1"} {
		if !enter(text) {
			t.Errorf("no turn for %s", text)
		}
	}
	if enter("192.0.2.5:1") {
		t.Error("there are more turns than there should be")
	}
	for _, leave := range leaves {
		leave()
	}
	if !enter("192.0.2.1:1") || d.all != 1 || len(d.of) != 1 {
		t.Errorf("%d turns are taken, by %d addresses", d.all, len(d.of))
	}
}
