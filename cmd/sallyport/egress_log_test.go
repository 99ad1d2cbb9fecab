package main

import (
	"log/slog"

	"github.com/rogpeppe/go-internal/testscript"

	"sallyport/internal/audit"
)

// tunnelled writes the log of a gateway: "tunnelled FILE". Web was refused twice
// where a row was missing, billing was let out twice and once named another host.
func tunnelled(ts *testscript.TestScript, _ bool, args []string) {
	log, err := audit.Open(audit.Config{Path: ts.MkAbs(args[0]), Log: slog.New(slog.DiscardHandler)})
	ts.Check(err)
	const web, billing = "spiffe://demo.sallyport/ns/shop/sa/web", "spiffe://demo.sallyport/ns/shop/sa/billing"
	for _, r := range []audit.Record{
		{Kind: audit.KindDecision, Decision: audit.Deny, Reason: "no_row", Dir: "out", Src: web, Dst: "host:api.adyen.test", Port: 443, Verb: "CONNECT", Path: "-"},
		{Kind: audit.KindDecision, Decision: audit.Deny, Reason: "no_row", Dir: "out", Src: web, Dst: "host:api.adyen.test", Port: 443, Verb: "CONNECT", Path: "-"},
		{Kind: audit.KindDecision, Decision: audit.Deny, Reason: "no_row", Dir: "in", Src: web, Dst: billing, Port: 8443, Verb: "GET", Path: "/"},
		{Kind: audit.KindEgressOpen, Decision: audit.Allow, Dir: "out", Src: billing, Dst: "host:api.stripe.test", Port: 443, Verb: "CONNECT", Path: "-"},
		{Kind: audit.KindEgressOpen, Decision: audit.Allow, Dir: "out", Src: billing, Dst: "host:api.stripe.test", Port: 443, Verb: "CONNECT", Path: "-"},
		{Kind: audit.KindDecision, Decision: audit.Deny, Reason: "sni_mismatch", Dir: "out", Src: billing, Dst: "host:api.stripe.test", Port: 443, Verb: "CONNECT", Path: "-"},
		{Kind: audit.KindEgressClose, Reason: "done", Dir: "out", Src: billing, Dst: "host:api.stripe.test", Port: 443, Verb: "CONNECT", Path: "-", BytesUp: 1000, BytesDown: 20000, Done: true},
		{Kind: audit.KindEgressClose, Reason: "sni_mismatch", Dir: "out", Src: billing, Dst: "host:api.stripe.test", Port: 443, Verb: "CONNECT", Path: "-", BytesUp: 1, Done: true},
	} {
		ts.Check(log.Append(&r))
	}
	ts.Check(log.Close())
}
