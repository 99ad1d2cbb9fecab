package main

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
)

// maxReview bounds a question: Kubernetes takes objects up to 3 MiB.
const maxReview = 4 << 20

// The parts of admission.k8s.io/v1 that are needed.
type (
	review struct {
		APIVersion string    `json:"apiVersion"`
		Kind       string    `json:"kind"`
		Request    *request  `json:"request,omitempty"`
		Response   *response `json:"response,omitempty"`
	}
	request struct {
		UID  string `json:"uid"`
		Kind struct {
			Group, Version, Kind string
		} `json:"kind"`
		Namespace string          `json:"namespace"`
		Operation string          `json:"operation"`
		Object    json.RawMessage `json:"object"`
	}
	response struct {
		UID       string  `json:"uid"`
		Allowed   bool    `json:"allowed"`
		Status    *status `json:"status,omitempty"`
		PatchType string  `json:"patchType,omitempty"`
		Patch     []byte  `json:"patch,omitempty"`
	}
	status struct {
		Code    int32  `json:"code"`
		Message string `json:"message"`
	}
)

// A hook answers Kubernetes.
type hook struct {
	cfg *Config
	log *slog.Logger
}

// ServeHTTP answers one AdmissionReview. What cannot be read is an error of HTTP,
// which with failurePolicy Fail makes no pod; so is a pod that cannot have a
// sidecar, with the reason.
func (h *hook) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxReview))
	if err != nil {
		http.Error(w, err.Error(), http.StatusRequestEntityTooLarge)
		return
	}
	var in review
	if err := json.Unmarshal(b, &in); err != nil || in.Request == nil || in.Request.UID == "" || in.APIVersion != "admission.k8s.io/v1" {
		http.Error(w, "no AdmissionReview of admission.k8s.io/v1 with a request", http.StatusBadRequest)
		return
	}
	out := review{APIVersion: in.APIVersion, Kind: "AdmissionReview", Response: h.answer(in.Request)}
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(out); err != nil {
		h.log.Error("the answer was not sent", "err", err)
	}
}

func (h *hook) answer(in *request) *response {
	out := &response{UID: in.UID}
	ops, err := h.patch(in)
	if err == nil && len(ops) > 0 {
		out.PatchType = "JSONPatch"
		out.Patch, err = json.Marshal(ops)
	}
	if err != nil {
		h.log.Warn("pod refused", "namespace", in.Namespace, "err", err)
		out.Status = &status{Code: http.StatusForbidden, Message: "sallyport: " + err.Error()}
		return out
	}
	h.log.Info("pod seen", "namespace", in.Namespace, "changes", len(ops))
	out.Allowed = true
	return out
}

// patch says what to add to the pod; nothing to what is none, or has a sidecar.
func (h *hook) patch(in *request) ([]operation, error) {
	if in.Kind.Kind != "Pod" || in.Kind.Group != "" || in.Operation != "CREATE" {
		return nil, nil
	}
	var p pod
	if err := json.Unmarshal(in.Object, &p); err != nil {
		return nil, fmt.Errorf("the pod cannot be read: %w", err)
	}
	if p.has(sidecarName) || p.Metadata.Annotations[annotationInject] == "false" {
		return nil, nil
	}
	if err := p.fits(h.cfg.User); err != nil {
		return nil, err
	}
	return p.with(h.cfg), nil
}
