package main

import (
	"strconv"
	"time"

	"sallyport/internal/sink"
	"sallyport/internal/telemetry"
)

// openExports prepares to send the metrics to a collector, if there is one.
func (in *issuer) openExports() (err error) {
	in.exports, err = sink.NewMetrics(in.cfg.Metrics, sink.Env{Program: "issuer", Metrics: in.metrics, Log: in.log}, func() string { return "issuer" })
	return err
}

// countCall counts the calls of proxies as a proxy counts those of workloads. The
// route is the method; callers are nodes, far too many to be told apart.
func (in *issuer) countCall() func(method string, code uint32, took time.Duration) {
	signals := telemetry.NewSignals(in.metrics, "issuer")
	return func(method string, code uint32, took time.Duration) {
		signals.SeriesOf(telemetry.ProtoGRPC, "", "issuer", method).Observe(&telemetry.Call{Code: 200, Status: strconv.FormatUint(uint64(code), 10), Took: took, End: time.Now()})
	}
}
