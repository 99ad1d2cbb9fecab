package page

import (
	"context"
	"encoding/pem"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
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

// A provider that did not answer is asked again after a while, not by each who comes.
func TestADeafProviderIsLeftAlone(t *testing.T) {
	asked, leave := 0, func() {}
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked++
		leave()
		http.Error(w, "down", http.StatusServiceUnavailable)
	}))
	defer srv.Close()
	ca := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}))
	o, err := newProvider(OIDC{Issuer: srv.URL, URL: "https://page.test", Client: "page", Viewers: []string{"staff"}, CA: ca}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	for _, at := range []struct {
		after time.Duration
		asked int
	}{{0, 1}, {time.Second, 1}, {providerAgain - 1, 1}, {providerAgain, 2}, {providerAgain + time.Second, 2}} {
		if _, err := o.discover(t.Context(), now.Add(at.after)); err == nil {
			t.Error("it has answered")
		}
		if asked != at.asked {
			t.Errorf("after %s it was asked %d times, want %d", at.after, asked, at.asked)
		}
	}
	// Nor is it for each who comes and goes.
	gone, cancel := context.WithCancel(t.Context())
	o.failed, leave = nil, cancel
	if _, err := o.discover(gone, now); err == nil || gone.Err() == nil || o.failed == nil || errors.Is(o.failed, context.Canceled) {
		t.Errorf("%v is remembered of one who has gone: %v", o.failed, err)
	}
}
