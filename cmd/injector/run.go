package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"sallyport/internal/daemon"
)

// run executes one command line.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	return daemon.CommandLine[Config]{
		Name: "injector", Short: "Put a sidecar into pods of Kubernetes",
		Fill:  (*Config).fill,
		Serve: func(ctx context.Context, c *Config, _ daemon.Run) error { return serve(ctx, c, stderr) },
	}.Execute(ctx, args, stdout, stderr)
}

// A pair is the certificate in use.
type pair struct {
	cfg *Config
	log *slog.Logger
	now atomic.Pointer[tls.Certificate]
}

// load reads the files. With a mistake in them what was read before stays.
func (p *pair) load() error {
	c, err := tls.LoadX509KeyPair(p.cfg.CertFile, p.cfg.KeyFile)
	if err != nil {
		return daemon.Exit(daemon.Usage, fmt.Errorf("cert_file, key_file: %w", err))
	}
	p.now.Store(&c)
	return nil
}

func (p *pair) reload() {
	if err := p.load(); err != nil {
		p.log.Error("the certificate was not read, the one before stays", "err", err)
	}
}

func serve(ctx context.Context, cfg *Config, stderr io.Writer) error {
	f, ok := stderr.(*os.File)
	log, _ := daemon.NewLogger(stderr, cfg.Log.Level, ok && daemon.IsTerminal(f))
	certificate := &pair{cfg: cfg, log: log}
	if err := certificate.load(); err != nil {
		return err
	}
	stop, now, cancel := daemon.Signals(ctx)
	defer cancel()
	mux := http.NewServeMux()
	mux.Handle("POST /mutate", &hook{cfg: cfg, log: log})
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok\n") })
	srv := &http.Server{
		Addr: cfg.Listen.String(), Handler: mux, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 10 * time.Second, IdleTimeout: time.Minute,
		MaxHeaderBytes: 16 << 10,
		TLSConfig: &tls.Config{
			MinVersion:     tls.VersionTLS13,
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return certificate.now.Load(), nil },
		},
	}
	g, run := errgroup.WithContext(stop)
	g.Go(func() error { return daemon.Watch(run, cfg.CertFile, time.Minute, certificate.reload) })
	g.Go(func() error {
		<-run.Done()
		return srv.Shutdown(now)
	})
	g.Go(func() error {
		log.Info("injector ready", "listen", cfg.Listen.String())
		if err := srv.ListenAndServeTLS("", ""); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
	return g.Wait()
}
