package main

import (
	"context"
	"crypto/tls"
	"net/http"
	"path/filepath"
	"strings"

	"golang.org/x/sync/errgroup"

	"sallyport/internal/daemon"
	"sallyport/internal/sink"
)

// administer serves the admin socket.
func (s *sidecar) administer(ground context.Context, g *errgroup.Group, drain func()) error {
	path := filepath.Join(s.cfg.RunDir, "admin.sock")
	ln, err := s.shift.Doors.Private("admin", path, s.log)
	if err != nil {
		return err
	}
	scrape, err := s.shift.Doors.TCP("metrics.listen", s.cfg.Metrics.Listen)
	if err != nil {
		return err
	}
	admin := &daemon.Admin{
		Socket: path, Listener: ln, Scrape: scrape, Ready: s.ready, Metrics: s.metrics.Handler(),
		ConfigDump: func() any { return s.cfg }, Level: s.level, Drain: drain, Pprof: s.cfg.Pprof, Log: s.log,
		Extra: map[string]http.Handler{
			"GET /identity": http.HandlerFunc(s.serveIdentity), "GET /identity/{pid}": http.HandlerFunc(s.serveProcess), "POST /handshakes/{service}": http.HandlerFunc(s.serveHandshakes),
			"GET /why/{id}": s.judge.WhyHandler(), "GET /candidate": s.judge.CandidateHandler(), "GET /shadow": s.mirror.ReportHandler(), "GET " + addressesPath: http.HandlerFunc(s.serveAddresses),
			"GET /troubles": http.HandlerFunc(s.serveTroubles), "POST /faults/stop": http.HandlerFunc(s.stopFaults), "GET /tap": s.taps.Handler(s.audit),
		},
	}
	g.Go(func() error { return admin.Run(ground) })
	return nil
}

// openExports prepares to send spans and metrics to collectors, if there are any.
func (s *sidecar) openExports() (err error) {
	env := sink.Env{
		Program: "sidecar", Identity: func() (*tls.Certificate, error) { return s.agent.Source().Certificate() }, Metrics: s.metrics, Log: s.log,
	}
	name := func() string {
		self, err := s.agent.Self()
		if err != nil {
			return "sidecar" // before it has an identity, of which it knows only when it asks
		}
		return strings.TrimPrefix(self.ID.Path(), "/")
	}
	s.tracer = s.cfg.Tracing.Tracer(s.metrics)
	if s.traces, err = sink.NewTraces(s.cfg.Tracing, s.tracer, env, name); err != nil {
		return err
	}
	s.exports, err = sink.NewMetrics(s.cfg.Metrics, env, name)
	return err
}
